"""The publisher: a process beside rank 0's trainer that delivers the journal to MLflow.

In reading order:

    progress         log, heartbeat, and what remains to be delivered
    launcher         starts, restarts and awaits the process
    retries          retries while the store is unreachable
    attempts         records of the attempts at a run
    artifact_worker  delivers checkpoints and texts
    publisher        delivers all other entries
    process          the process's entry point
    sync             `harness sync`
"""
