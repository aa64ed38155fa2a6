"""The ranges of a file: who wrote which bytes, with which digest.

A thousand ranks write two million ranges, so they are kept by columns, in memory and in the manifest. Importing this
module never imports torch or numpy.
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

    def __getnewargs__(self) -> tuple[list[int], list[int], bytes]:
        """The arguments that construct these ranges on another rank; see `harness.distributed.rank_values`."""
        return [end - start for start, end in pairwise(self._bounds)], self._ranks.tolist(), self._digests

    def __repr__(self) -> str:
        return f"<{len(self)} ranges of {self.size_bytes} bytes>"

    @property
    def _columns(self) -> tuple[array[int], array[int], bytes]:
        return self._bounds, self._ranks, self._digests

    def to_json(self) -> dict[str, str]:
        """The columns as text: ``sizes`` (int64) and ``ranks`` (int32) as zlib in base64, ``digests`` as base64."""
        sizes = array("q", (end - start for start, end in pairwise(self._bounds)))
        return {"sizes": _packed(sizes), "ranks": _packed(self._ranks), "digests": _text(self._digests)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Ranges:
        """Read what `to_json` returned.

        Raises:
            KeyError, TypeError, ValueError, zlib.error: if it is something else.
        """
        digests = base64.b64decode(record["digests"])
        return cls(_unpacked("q", record["sizes"]), _unpacked("i", record["ranks"]), digests)

    @classmethod
    def from_version_2(cls, record: Any) -> Ranges:
        """Read ranges of format version 2: a list of ranges, or the columns if there are many.

        Raises:
            KeyError, TypeError, ValueError, zlib.error: if it is something else.
        """
        return cls.of(Range(*part) for part in record) if isinstance(record, list) else cls.from_json(record)


def _packed(column: array[int]) -> str:
    # Level 1: most columns repeat one number, and higher levels take several times as long.
    return _text(zlib.compress(_little_endian(column).tobytes(), 1))


def _unpacked(typecode: str, text: str) -> array[int]:
    return _little_endian(array(typecode, zlib.decompress(base64.b64decode(text))))


def _little_endian(column: array[int]) -> array[int]:
    """The column in the byte order of the file, or back in that of the machine."""
    if sys.byteorder == "big":
        column = column[:]
        column.byteswap()
    return column


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
