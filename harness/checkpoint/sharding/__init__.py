"""Which bytes of which tensor a rank holds: one answer for each strategy, behind one function.

In reading order:

    state_form     the optimizer's state of one parameter, as a tree
    local_shards   the shards that a rank holds, whatever the strategy
    plain          single process, DDP, FSDP2, HSDP
    dtensor        the placements of a `DTensor`
    fsdp1          FSDP1's flat parameters
    zero           DeepSpeed ZeRO-1, 2, 3
    find_shards    the shards of one model: the entry to the strategies
    shard_catalog  what all ranks hold
    replicas       whether equal parts have equal values
"""
