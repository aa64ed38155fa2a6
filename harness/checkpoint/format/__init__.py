"""Define the files of a checkpoint and verify them.

In reading order:

    names            name each tensor by its path in the unwrapped model
    ranges           the byte ranges of a file, each with its writer rank and digest
    digest           the digest of a range
    files            read bytes from the local disk or from another rank
    commit           write, read and list manifests; the manifest commits a checkpoint
    layout           the byte offset of each tensor in the safetensors files
    tensor_shard     the part of a tensor that a rank holds
    all_ranges       the byte ranges that each rank writes
    partial_digests  digests of ranges that several ranks have read in part
    index            the tensors of a checkpoint, by parameter name
    verify           compare every byte of a checkpoint with its digests
    json_values      Python values as JSON
"""
