"""The digest of a range of a file, which several ranks can compute together from the parts that each has read.

    digest = XOR of the XXH3-128 of each leaf, seeded with the leaf's number; a leaf is 16 KiB from the range's start on

On another topology a rank reads only a part of a range. The XOR over the leaves that it has read is one number, and the
numbers of all ranks make the digest. Only leaves that lie across a border between ranks are read again.
Importing this module never imports torch.
"""

from __future__ import annotations

from xxhash import xxh3_128_intdigest

# A border between two ranks costs reading at most one more leaf; smaller leaves take longer to hash.
LEAF_BYTES = 16 << 10


def digest_of(data: bytes | memoryview) -> str:
    """The digest of a whole range, in hex."""
    return in_hex(leaves_of(data))


def leaves_of(data: bytes | memoryview, first: int = 0) -> int:
    """The share of consecutive leaves in the digest of their range.

    Args:
        data: their bytes; only a range's last leaf may be shorter.
        first: number of the first leaf, from 0.
    """
    found = 0
    for number, start in enumerate(range(0, len(data), LEAF_BYTES), first):
        found ^= xxh3_128_intdigest(data[start : start + LEAF_BYTES], number)
    return found


def num_leaves(size_bytes: int) -> int:
    """Number of leaves of a range of that size."""
    return -(-size_bytes // LEAF_BYTES)


def in_hex(digest: int) -> str:
    """The digest as in a manifest."""
    return f"{digest:032x}"
