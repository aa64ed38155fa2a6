"""From reduced metrics and committed checkpoints to MLflow.

Read in this order: `outbox` over `segments` (the journal on disk), `tracker` (what rank zero's trainer does),
`publisher` and `model_lane` (the process that delivers), `mlflow_store` (what it says, in MLflow's terms), `uploads`
(files), `mlmodel` (the files that make weights a model of MLflow's), `provenance` (where a run came from). Only
`mlflow_store`, `uploads`, and `artifacts`, which downloads, import mlflow.
"""
