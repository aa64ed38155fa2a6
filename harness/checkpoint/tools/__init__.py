"""What `harness inspect`, `export` and the retention do with checkpoints.

In reading order:

    inspect    what is in one
    export     its weights as plain safetensors
    retention  which ones are removed, and when
"""
