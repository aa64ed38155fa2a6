"""Access files, locks, child processes and standard streams.

In reading order:

    durable_files     replace a file so that a crash leaves either the old or the new content
    lock_file         open lock files that other users cannot open
    redact            remove secrets from text that is written
    standard_streams  write to standard output and error, even if they are closed
    progress          display the progress on rank 0
    child_process     start a child process in which a user's files cannot shadow modules
"""
