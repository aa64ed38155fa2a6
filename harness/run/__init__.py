"""A run's directory and the control of the job that works on it.

In reading order:

    lock           the lock that admits one job for each run
    directory      creates or opens the run's directory on rank zero
    signals        signals that stop the run or request a save
    stop_request   the file by which `harness stop` stops a run
    requeue_limit  refuses a job that is requeued without progress
"""
