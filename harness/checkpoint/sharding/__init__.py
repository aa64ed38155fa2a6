"""Find which elements of which tensors a rank holds, for each strategy, behind one function.

In reading order:

    state_form     the optimizer's state of one parameter, as a tree
    local_shards   the shards that a rank holds, for any strategy
    plain          single process, DDP, FSDP2, HSDP
    dtensor        the placements of a `DTensor`
    fsdp1          FSDP1's flat parameters
    zero           DeepSpeed ZeRO-1, 2, 3
    find_shards    select the strategy and find the shards of one model
    shard_catalog  the shards of all ranks
    replicas       check that replicated parts have equal values
"""
