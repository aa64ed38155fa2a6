"""Record the byte ranges of a file, each with its writer rank and digest.

A thousand ranks write two million ranges, so memory and manifest store them in columns. This module imports neither
torch nor numpy.
"""

from __future__ import annotations

import base64
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, overload

DIGEST_BYTES = 16


class Range(NamedTuple):
    """Describe bytes `start` to `end` of a file: the rank that wrote them, and their `digest_of` in hex."""

    start: int
    end: int
    rank: int
    digest: str


class Ranges(Sequence[Range]):
    """Hold all ranges of one file, in order and without gaps.

    Args:
        sizes: bytes of each range.
        ranks: writer rank of each range.
        digests: `DIGEST_BYTES` bytes for each range.

    Raises:
        ValueError: if the columns differ in length, or a size or a rank is negative.
    """

    def __init__(self, sizes: Sequence[int] = (), ranks: Sequence[int] = (), digests: bytes = b"") -> None:
        if not len(sizes) == len(ranks) == len(digests) / DIGEST_BYTES:
            raise ValueError(f"{len(sizes)} sizes, {len(ranks)} ranks and {len(digests)} bytes of digests do not match")
        if min(sizes, default=0) < 0 or min(ranks, default=0) < 0:
            raise ValueError("a size or a rank is negative")
        # First byte of each range, then the end of the last.
        self._bounds = array("q", accumulate(sizes, initial=0))
        self._ranks = array("i", ranks)
        self._digests = digests

    @classmethod
    def of(cls, ranges: Iterable[Range]) -> Ranges:
        """Build the columns from single ranges."""
        listed = list(ranges)
        digests = bytes.fromhex("".join(part.digest for part in listed))
        return cls([part.end - part.start for part in listed], [part.rank for part in listed], digests)

    @property
    def size_bytes(self) -> int:
        """Return the total bytes of all ranges."""
        return self._bounds[-1]

    def index_at(self, byte: int) -> int:
        """Return the index of the last range that begins at or before `byte`; 0 if there is none."""
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

    def __getnewargs__(self) -> tuple[list[int], list[int], bytes]:
        """Return the constructor arguments for another rank; see `harness.distributed.rank_values`."""
        return [end - start for start, end in pairwise(self._bounds)], self._ranks.tolist(), self._digests

    def __repr__(self) -> str:
        return f"<{len(self)} ranges of {self.size_bytes} bytes>"

    @property
    def _columns(self) -> tuple[array[int], array[int], bytes]:
        return self._bounds, self._ranks, self._digests

    def to_json(self) -> dict[str, str]:
        """Encode ``sizes`` (int64) and ``ranks`` (int32) with zlib and base64, ``digests`` with base64."""
        sizes = array("q", (end - start for start, end in pairwise(self._bounds)))
        return {"sizes": _packed(sizes), "ranks": _packed(self._ranks), "digests": _text(self._digests)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Ranges:
        """Decode a result of `to_json`.

        Raises:
            KeyError, TypeError, ValueError, zlib.error: if `record` is anything else.
        """
        digests = base64.b64decode(record["digests"])
        return cls(_unpacked("q", record["sizes"]), _unpacked("i", record["ranks"]), digests)

    @classmethod
    def from_version_2(cls, record: Any) -> Ranges:
        """Decode ranges of format version 2: a list of ranges, or columns if there are many. Raises as `from_json`."""
        return cls.of(Range(*part) for part in record) if isinstance(record, list) else cls.from_json(record)


def _packed(column: array[int]) -> str:
    # Level 1 suffices: most columns repeat one number, and higher levels take several times as long.
    return _text(zlib.compress(_little_endian(column).tobytes(), 1))


def _unpacked(typecode: str, text: str) -> array[int]:
    return _little_endian(array(typecode, zlib.decompress(base64.b64decode(text))))


def _little_endian(column: array[int]) -> array[int]:
    """Convert a column between the byte order of the file and that of the machine."""
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
