"""Access files, locks, child processes and standard streams.

In reading order:

    durable_files     replace a file so that a crash leaves either the old or the new content
    lock_file         lock files that other users cannot open
    redact            remove secrets from text that is written
    standard_streams  write to standard output and error, even if they are closed
    progress          the progress bar and lines of rank 0
    child_process     start a child process that imports this package and the standard library
"""
