"""Tracking: from reduced metrics and committed checkpoints to MLflow.

In reading order:

    journal/    the log of what MLflow shall receive
    mlflow/     the MLflow store
    publisher/  the process that delivers the journal
    provenance  command, code, versions, machine and data of a run
    tracker     the trainer's interface
"""
