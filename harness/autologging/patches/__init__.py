"""Replace functions of libraries whose calls are not events of a training.

In reading order:

    mlflow           what the script logs to MLflow itself
    other_ranks      MLflow on ranks other than 0
    summary_writers  TensorBoard's writers under MLflow's autologging
"""
