"""Which bytes of which tensor a rank holds: one answer for each strategy, behind one function.

In reading order:

    state_form     the optimizer's state of one parameter, as a tree
    local_shards   all that a rank holds, whatever the strategy
    plain          single process, DDP, FSDP2, HSDP
    dtensor        the placements of a `DTensor`
    fsdp1          FSDP1's flat parameters
    zero           DeepSpeed ZeRO-1, 2, 3
    shard_catalog  what all ranks hold
    replicas       whether equal parts have equal values
"""
