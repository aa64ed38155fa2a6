"""The digest of a range of a file, which several ranks can make together, each of what it has read.

    digest = XOR of XXH3-128 of each leaf, seeded with the leaf's number; a leaf is 16 KiB from the range's start on

On another topology a rank wants a part of a range. What it knows of the leaves that it has read whole is one
number, and the numbers of several ranks make the digest: only leaves that a border cuts are read once more.
Importing this never imports torch.
"""

from __future__ import annotations

from xxhash import xxh3_128_intdigest

# A border between two ranks costs at most one more of these to read; smaller ones take longer to hash.
LEAF_BYTES = 16 << 10


def digest_of(data: bytes | memoryview) -> str:
    """The digest, in hex, of all of a range."""
    return in_hex(leaves_of(data))


def leaves_of(data: bytes | memoryview, first: int = 0) -> int:
    """What some leaves in a row have in a digest.

    Args:
        data: their bytes; only a range's last leaf may be shorter.
        first: number of the first of them, from 0.
    """
    found = 0
    for number, start in enumerate(range(0, len(data), LEAF_BYTES), first):
        found ^= xxh3_128_intdigest(data[start : start + LEAF_BYTES], number)
    return found


def num_leaves(size_bytes: int) -> int:
    """How many a range of that size has."""
    return -(-size_bytes // LEAF_BYTES)


def in_hex(digest: int) -> str:
    """As manifests have it."""
    return f"{digest:032x}"
