"""Record metrics and checkpoints in a journal on disk, and deliver the journal to MLflow.

In reading order:

    journal/    the append-only log of entries for MLflow
    mlflow/     the MLflow store
    publisher/  the process that delivers the journal
    provenance  command, code, versions, machine and data of a run
    tracker     the trainer's interface
"""
