"""What a checkpoint holds besides the tensors of model and optimizer.

In reading order:

    kept_tensors      tensors that JSON values refer to
    optimizer_record  of the optimizer: its class, and state of no parameter
    trainer_state     ``trainer_state.json``
    rank_state        of one rank: random numbers, position in the data
    param_groups      parameter groups, matched by parameters' names
    schedules         learning rate schedules of a run that is resumed
    parts             several models together
    huge_pages        large pages for memory that is about to be filled
    materialize       the state of an optimizer before its first step
"""
