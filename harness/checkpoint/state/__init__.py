"""The content of a checkpoint besides the tensors of model and optimizer.

In reading order:

    kept_tensors      tensors that JSON values refer to
    optimizer_record  an optimizer's class, groups, and state that belongs to no parameter
    trainer_state     ``trainer_state.json``
    rank_state        the state of one rank: random numbers, position in the data
    parts             the shards of several models together
    param_groups      parameter groups, matched by parameters' names
    schedules         learning rate schedules of a resumed run
    zero_step         a step that leaves no trace, to learn what an optimizer keeps
    materialize       the state of an optimizer before its first step
"""
