"""What a process reads and writes besides training: files, locks, child processes, streams.

In reading order:

    durable_files     replace a file so that a crash leaves the old one or the new one
    lock_file         lock files that other users cannot open
    redact            remove secrets from what is written
    standard_streams  standard output and error that may be closed
    progress          the progress bar and lines of rank zero
    child_process     start a child process whatever lies in the working directory
"""
