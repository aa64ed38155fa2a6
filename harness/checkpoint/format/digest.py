"""Compute the digest of a range of a file, which several ranks can compute together.

    digest = XOR over the range's 16 KiB leaves of XXH3-128(leaf, seed = number of the leaf)

After a change of topology a rank reads only a part of a range. Each rank computes the XOR over the leaves that it has
read, and the XOR of these is the digest. Only leaves that cross a border between ranks must be read again. This module
never imports torch.
"""

from __future__ import annotations

from xxhash import xxh3_128_intdigest

# Each border between two ranks costs reading at most one leaf again; smaller leaves take longer to hash.
LEAF_BYTES = 16 << 10


def digest_of(data: bytes | memoryview) -> str:
    """Return the digest of a whole range, in hex."""
    return in_hex(leaves_of(data))


def leaves_of(data: bytes | memoryview, first: int = 0) -> int:
    """Return the XOR of the hashes of consecutive leaves; `first` is the number of the first one, from 0.

    Only the last leaf of a range may be shorter than `LEAF_BYTES`.
    """
    found = 0
    for number, start in enumerate(range(0, len(data), LEAF_BYTES), first):
        found ^= xxh3_128_intdigest(data[start : start + LEAF_BYTES], number)
    return found


def num_leaves(size_bytes: int) -> int:
    """Return the number of leaves of a range of `size_bytes`."""
    return -(-size_bytes // LEAF_BYTES)


def in_hex(digest: int) -> str:
    """Format a digest as in a manifest: 32 hex digits."""
    return f"{digest:032x}"
