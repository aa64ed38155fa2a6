"""From reduced metrics and committed checkpoints to MLflow.

Read in this order: `outbox` (the journal on disk), `tracker` (what rank zero's trainer does),
`publisher` (the process that delivers), `mlflow_store` (the only file that imports mlflow),
`provenance` (where a run came from).
"""
