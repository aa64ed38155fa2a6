"""From reduced metrics and committed checkpoints to MLflow.

Read in this order: `outbox` (the journal on disk), `tracker` (what rank zero's trainer does),
`publisher` (the process that delivers), `mlflow_store` (what it says, in MLflow's terms), `mlmodel` (the files
that make weights a model of MLflow's), `provenance` (where a run came from). Only `mlflow_store`, and `artifacts`,
which reads, import mlflow.
"""
