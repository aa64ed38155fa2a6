"""Which bytes of which file each rank writes, by columns: what rank zero knows of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import Layout
from harness.checkpoint.format.ranges import DIGEST_BYTES, Range, Ranges

# Fewer of a file are listed one by one in the manifest, for people.
MANY = 4096
_COLUMNS = 4


class FileRange(NamedTuple):
    """Bytes of a file that one rank writes from its staging memory; all in bytes."""

    file: int
    offset: int
    staging: int
    size: int


def packed(staging_bytes: int, ranges: Iterable[FileRange]) -> bytes:
    """What a rank tells rank zero."""
    return np.array([(staging_bytes, 0, 0, 0), *ranges], dtype=np.int64).tobytes()


class AllRanges:
    """What every rank writes.

    Attributes:
        staging_bytes: size of each rank's memory.
    """

    def __init__(self, layout: Layout, staging_bytes: Sequence[int], columns: Sequence[NDArray[np.int64]]) -> None:
        self.staging_bytes = staging_bytes
        self._layout = layout
        self._table = np.concatenate(columns)
        self._firsts = np.cumsum([0, *map(len, columns)])
        files, offsets, _, sizes = self._table.T
        self._ranks = np.repeat(np.arange(len(columns), dtype=np.int32), np.diff(self._firsts))
        # In the order of the files: the same at each save. By one number, which takes half as long as by two.
        begins = np.cumsum([0, *(file.size_bytes for file in layout.files)])
        self._order = np.argsort(begins[files] + offsets).astype(np.int32)
        self._bounds = np.searchsorted(files[self._order], np.arange(len(layout.files) + 1))
        for number, file in enumerate(layout.files):
            mine = self._order[self._bounds[number] : self._bounds[number + 1]]
            ends = np.concatenate([[len(file.header)], offsets[mine] + sizes[mine]])
            # An invariant of ours, and cheap beside what a wrong file would cost.
            assert ends[-1] == file.size_bytes and np.array_equal(offsets[mine], ends[:-1]), file.name

    @classmethod
    def of(cls, layout: Layout, told: Iterable[bytes]) -> AllRanges:
        """Given what each rank has told, as `packed` made it."""
        tables = [np.frombuffer(each, dtype=np.int64).reshape(-1, _COLUMNS) for each in told]
        return cls(layout, [int(table[0, 0]) for table in tables], [table[1:] for table in tables])

    def of_rank(self, rank: int) -> list[FileRange]:
        """What one rank writes, in the order of its memory."""
        return [FileRange(*row) for row in self._table[self._firsts[rank] : self._firsts[rank + 1]].tolist()]

    def records(self, digests: Sequence[bytes]) -> list[FileRecord]:
        """What the manifest says of the files of tensors.

        Args:
            digests: of each rank's ranges, in its order, 16 bytes each.
        """
        every = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        assert len(every) == len(self._table)
        return [self._record(number, every) for number in range(len(self._layout.files))]

    def _record(self, number: int, digests: NDArray[np.uint8]) -> FileRecord:
        file = self._layout.files[number]
        mine = self._order[self._bounds[number] : self._bounds[number + 1]]
        header = np.frombuffer(bytes.fromhex(digest_of(file.header)), dtype=np.uint8)
        ranges = Ranges(
            np.concatenate([[0], self._table[mine, 1], [file.size_bytes]]),
            # Rank zero writes the headers.
            np.concatenate([np.zeros(1, dtype=np.int32), self._ranks[mine]]),
            np.concatenate([header[None], digests[mine]]),
        )
        listed: Sequence[Range] = ranges if len(ranges) > MANY else tuple(ranges)
        return FileRecord(file.name, file.size_bytes, listed)
