"""From sharded state to a committed directory of safetensors, and back.

In reading order:

    format/    what is in a checkpoint's directory
    sharding/  which bytes of which tensor a rank holds, by strategy
    state/     all that is not a tensor of the model or the optimizer
    save/      plan, copy, write, commit
    restore/   find, read, put into model and optimizer
    tools/     inspect, export, remove
"""
