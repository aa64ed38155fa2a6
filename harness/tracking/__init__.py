"""From reduced metrics and committed checkpoints to MLflow.

Read in this order: `names` (which names MLflow accepts), `outbox`, which writes `entries` into `segments` (the journal
on disk), `acknowledged` (how far it is delivered), `pruning` (what of it may go), `tracker` (what rank zero's trainer
does), `publisher` and `model_lane` (the process that delivers), `halving` (what the store refuses of a request),
`mlflow_store` (a run and its records, in MLflow's terms), `mlflow_models` (its models), `uploads` (their files),
`mlmodel` (the files that make weights a model of MLflow's), `provenance` (where a run came from). Only `mlflow_*`,
`uploads`, and `artifacts`, which downloads, import mlflow.
"""
