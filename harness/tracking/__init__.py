"""From reduced metrics and committed checkpoints to MLflow.

In reading order:

    journal/    what happened, on this disk
    mlflow/     what MLflow calls it
    publisher/  the process that delivers the journal
    provenance  command, code, versions, machine, data
    tracker     what rank zero's trainer calls
"""
