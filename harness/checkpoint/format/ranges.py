"""The ranges of a file: who wrote which bytes, with which digest.

A thousand ranks write two million ranges, so they are kept by columns, in memory and in the manifest. Importing this
module never imports torch or numpy.
"""

from __future__ import annotations

import base64
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, overload

DIGEST_BYTES = 16


class Range(NamedTuple):
    """Bytes `start` to `end` of a file, the rank that wrote them, and their `digest_of` in hex."""

    start: int
    end: int
    rank: int
    digest: str


class Ranges(Sequence[Range]):
    """All ranges of one file, in order and without gaps.

    Args:
        sizes: bytes of each range.
        ranks: the rank that wrote each range.
        digests: `DIGEST_BYTES` for each range.

    Raises:
        ValueError: if the columns differ in length, or a size or a rank is negative.
    """

    def __init__(self, sizes: Sequence[int] = (), ranks: Sequence[int] = (), digests: bytes = b"") -> None:
        if not len(sizes) == len(ranks) == len(digests) / DIGEST_BYTES:
            raise ValueError(f"{len(sizes)} sizes, {len(ranks)} ranks and {len(digests)} bytes of digests do not match")
        if min(sizes, default=0) < 0 or min(ranks, default=0) < 0:
            raise ValueError("a size or a rank is negative")
        # The first byte of each range, and the end of the last one.
        self._bounds = array("q", accumulate(sizes, initial=0))
        self._ranks = array("i", ranks)
        self._digests = digests

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> Ranges:
        """The columns of these ranges."""
        listed = list(ranges)
        digests = bytes.fromhex("".join(part.digest for part in listed))
        return cls([part.end - part.start for part in listed], [part.rank for part in listed], digests)

    @property
    def size_bytes(self) -> int:
        """Bytes of all ranges together."""
        return self._bounds[-1]

    def index_at(self, byte: int) -> int:
        """Index of the last range that begins at or before `byte`; 0 if there is none."""
        return max(0, bisect_right(self._bounds, byte, hi=len(self)) - 1)

    def __len__(self) -> int:
        return len(self._ranks)

    @overload
    def __getitem__(self, index: int) -> Range: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Range, ...]: ...

    def __getitem__(self, index: int | slice) -> Range | tuple[Range, ...]:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(len(self))))
        rank = self._ranks[index]
        index %= len(self)
        digest = self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        return Range(self._bounds[index], self._bounds[index + 1], rank, digest.hex())

    def __iter__(self) -> Iterator[Range]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranges) and self._columns == other._columns

    def __hash__(self) -> int:
        return hash(self._digests)

    @property
    def _columns(self) -> tuple[array[int], array[int], bytes]:
        return self._bounds, self._ranks, self._digests

    def to_json(self) -> dict[str, Any]:
        """The columns as JSON values: ``sizes`` and ``ranks`` are lists, ``digests`` is one hex string."""
        bounds = self._bounds.tolist()
        sizes = [end - start for start, end in pairwise(bounds)]
        return {"sizes": sizes, "ranks": self._ranks.tolist(), "digests": self._digests.hex()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Ranges:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if it is something else.
        """
        return cls(record["sizes"], record["ranks"], bytes.fromhex(record["digests"]))

    @classmethod
    def from_version_2(cls, record: Any) -> Ranges:
        """Read ranges of format version 2: a list of ranges, or little-endian columns if there are many.

        Raises:
            KeyError, TypeError, ValueError, zlib.error: if it is something else.
        """
        if isinstance(record, list):
            return cls.of(Range(*part) for part in record)
        sizes = array("q", zlib.decompress(base64.b64decode(record["sizes"])))
        ranks = array("i", zlib.decompress(base64.b64decode(record["ranks"])))
        return cls(sizes, ranks, base64.b64decode(record["digests"]))
