"""Deliver the journal to MLflow in a separate process, the publisher, on rank 0's host.

In reading order:

    progress         log, heartbeat and progress of the delivery
    launcher         starts, restarts and awaits the process
    retries          retries while the store is unreachable
    attempts         records of the attempts at a run
    artifact_worker  delivers checkpoints and texts
    publisher        delivers all other entries
    process          the process's entry point
    sync             `harness sync`
"""
