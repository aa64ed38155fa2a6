"""A checkpoint into what the ranks hold now, on any number of ranks.

In reading order:

    locate           from a path or an address to a directory
    remote_files     files for ranks that do not see them
    visibility       which ranks see the checkpoint
    read             read bytes, and check them
    read_plan        what is to be read from where
    restore          tensors
    restore_trainer  all else
    resume           the newest whole checkpoint of a run
"""
