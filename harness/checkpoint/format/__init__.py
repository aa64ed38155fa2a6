"""What is in a checkpoint's directory, and how it is checked.

In reading order:

    names         the name of a tensor: its path in the user's model
    ranges        ranges of bytes in a file
    digest        the digest of a range
    strict_json   JSON that may be damaged
    json_values   Python values as JSON
    commit        the manifest: a directory that has one is a checkpoint
    files         where the bytes come from: this disk, or another rank
    layout        the byte of the file where each tensor begins
    tensor_shard  the part of a tensor that a rank holds
    all_ranges    the bytes that each rank writes
    check         digests of ranges while bytes are read
    index         the tensors of a checkpoint, by parameter
    verify        whether every byte is what was written
"""
