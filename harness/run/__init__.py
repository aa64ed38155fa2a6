"""The directory of a run, and who works on it.

In reading order:

    lock           one job for each run
    directory      made or found, on rank zero
    signals        stop and save on a signal
    stop_request   `harness stop`
    requeue_limit  a job that is queued again without progress
"""
