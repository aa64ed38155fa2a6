"""Save and restore the parts of a checkpoint other than the tensors of model and optimizer.

In reading order:

    kept_tensors      tensors that JSON values refer to
    optimizer_record  an optimizer's class, groups, and state that belongs to no parameter
    trainer_state     ``trainer_state.json``
    rank_state        the state of one rank: random numbers, position in the data
    parts             find and merge the shards of all watched models
    param_groups      match parameter groups by parameter names
    schedules         compare or reset learning rate schedules at a resume
    zero_step         a side-effect-free step, to get the state that an optimizer creates
    materialize       build an optimizer's state before its first step
"""
