"""Restore a checkpoint on any number of ranks, under any strategy.

In reading order:

    resume        restore the newest intact checkpoint of a run
    locate        from a path or an address to directories
    visibility    open a checkpoint on ranks that see it and on ranks that do not
    remote_files  files for ranks that do not see them
    restore       restore the tensors
    read_plan     match names, and plan what is read from where
    read          read bytes and check them
"""
