"""Write runs, models and artifacts to MLflow.

Only `client`, `store`, `models`, `uploads` and `artifacts` import mlflow.

In reading order:

    names           names that MLflow accepts
    given_run       the existing MLflow run that the user chose
    registry        versions and aliases of a registered model
    mlmodel         the files of an MLflow model
    store_protocol  the interface between the publisher and a store
    client          the connection, its limits, and permanent errors
    uploads         uploads to the artifact store
    models          checkpoints as LoggedModels
    store           one run in an MLflow store
    artifacts       downloads
"""
