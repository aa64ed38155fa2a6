"""The run, its records and its models, in MLflow's terms.

Only `client`, `store`, `models`, `uploads` and `artifacts` import mlflow.

In reading order:

    names           names that MLflow accepts
    given_run       the run that the user has named
    registry        versions and aliases of a registered model
    mlmodel         the files that make weights an MLflow model
    store_protocol  what the publisher needs of a store
    client          reach the server; which answers are final
    halving         find the items that a store refuses
    uploads         files into the artifact store
    models          checkpoints as LoggedModels
    store           the run and its records
    artifacts       download
"""
