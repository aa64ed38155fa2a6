"""Ranges of a file, and very many of them by columns: a thousand ranks write two million.

Importing this never imports torch, and numpy only where there are so many.
"""

from __future__ import annotations

import base64
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DIGEST_BYTES = 16
_SIZES, _SIZE_BYTES = "<i8", 8
_RANKS, _RANK_BYTES = "<i4", 4


class Range(NamedTuple):
    """Bytes `start` to `end` of a file: the rank that wrote them, and their `digest_of`, in hex."""

    start: int
    end: int
    rank: int
    digest: str


class Ranges(Sequence[Range]):
    """Ranges of one file, in order and without gaps.

    Args:
        bounds: shape (n + 1,), int64: the first byte of each, and the end of the last.
        ranks: shape (n,), int32.
        digests: shape (n, 16), uint8.
    """

    def __init__(self, bounds: NDArray[np.int64], ranks: NDArray[np.int32], digests: NDArray[np.uint8]) -> None:
        self.bounds = bounds
        self._ranks = ranks
        self._digests = digests

    def __len__(self) -> int:
        return len(self._ranks)

    @overload
    def __getitem__(self, number: int) -> Range: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[Range, ...]: ...

    def __getitem__(self, number: int | slice) -> Range | tuple[Range, ...]:
        if isinstance(number, slice):
            return tuple(self[each] for each in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        number %= len(self)
        start, end = self.bounds[number : number + 2].tolist()
        return Range(start, end, int(self._ranks[number]), self._digests[number].tobytes().hex())

    def __iter__(self) -> Iterator[Range]:
        bounds, ranks, text = self.bounds.tolist(), self._ranks.tolist(), self._digests.tobytes().hex()
        width = 2 * DIGEST_BYTES
        for number, rank in enumerate(ranks):
            digest = text[number * width : (number + 1) * width]
            yield Range(bounds[number], bounds[number + 1], rank, digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(Range.__eq__, self, other))

    def __hash__(self) -> int:
        return hash(self._digests.tobytes())

    def packed(self) -> dict[str, Any]:
        """As JSON values: little-endian columns, those that compress well by zlib, in base64."""
        import numpy as np

        return {
            "num": len(self),
            "sizes": _text(zlib.compress(np.diff(self.bounds).astype(_SIZES).tobytes(), 1)),
            "ranks": _text(zlib.compress(self._ranks.astype(_RANKS).tobytes(), 1)),
            "digests": _text(self._digests.tobytes()),
        }

    @classmethod
    def unpacked(cls, record: Any, size_bytes: int) -> Ranges:
        """What `packed` made, for a file of so many bytes.

        Raises:
            ValueError: if it is anything else.
        """
        import numpy as np

        if not isinstance(record, dict) or record.keys() != {"num", "sizes", "ranks", "digests"}:
            raise ValueError("ranges is no list, and not num, sizes, ranks and digests")
        num = record["num"]
        if type(num) is not int or num < 0:
            raise ValueError("the number of its ranges is no whole number from 0 on")
        digests = np.frombuffer(_data(record, "digests"), dtype=np.uint8)
        if len(digests) != num * DIGEST_BYTES:
            raise ValueError(f"it has {len(digests)} bytes of digests for {num} ranges")
        sizes = np.frombuffer(_inflated(record, "sizes", num * _SIZE_BYTES), dtype=_SIZES)
        ranks = np.frombuffer(_inflated(record, "ranks", num * _RANK_BYTES), dtype=_RANKS)
        bounds = np.zeros(num + 1, dtype=np.int64)
        np.cumsum(sizes, out=bounds[1:])
        # Each at most the file, and rising: so the sum has not come round.
        if num and (sizes.min() < 0 or sizes.max() > size_bytes or np.diff(bounds).min() < 0 or ranks.min() < 0):
            raise ValueError("a range or its rank is negative, or a range longer than the file")
        if bounds[-1] != size_bytes:
            raise ValueError(f"its ranges end at {bounds[-1]}, the file at {size_bytes}")
        return cls(bounds, ranks.astype(np.int32), digests.reshape(num, DIGEST_BYTES))


def number_at(ranges: Sequence[Range], byte: int) -> int:
    """Number of the last range that begins at or before a byte; 0 where none does."""
    if isinstance(ranges, Ranges):
        found = int(ranges.bounds[:-1].searchsorted(byte, side="right"))
    else:
        found = bisect_right(ranges, byte, key=lambda part: part.start)
    return max(0, found - 1)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _data(record: dict[str, Any], name: str) -> bytes:
    if not isinstance(record[name], str):
        raise ValueError(f"the {name} of its ranges are no text")
    return base64.b64decode(record[name], validate=True)


def _inflated(record: dict[str, Any], name: str, size_bytes: int) -> bytes:
    """No more of it than it should have, whatever it says."""
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(_data(record, name), size_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"the {name} of its ranges cannot be unpacked: {error}") from error
    if len(data) != size_bytes or not inflater.eof:
        raise ValueError(f"the {name} of its ranges are not {size_bytes} bytes")
    return data
