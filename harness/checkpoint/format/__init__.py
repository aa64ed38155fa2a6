"""The files of a checkpoint, and how they are verified.

In reading order:

    names            the name of a tensor: its path in the user's model
    ranges           the ranges of a file: writer and digest
    digest           the digest of a range
    files            the source of the bytes: this disk, or another rank
    commit           the manifest: a directory that has one is a checkpoint
    layout           the byte of the file where each tensor begins
    tensor_shard     the part of a tensor that a rank holds
    all_ranges       the bytes that each rank writes
    partial_digests  digests of ranges that several ranks have read in part
    index            the tensors of a checkpoint, by parameter
    verify           whether every byte is what was written
    json_values      Python values as JSON
"""
