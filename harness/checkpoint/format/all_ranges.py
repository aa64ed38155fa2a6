"""Collect on rank 0 which bytes of each file each rank writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import Layout
from harness.checkpoint.format.ranges import DIGEST_BYTES, Ranges

_COLUMNS = 4


class FileRange(NamedTuple):
    """Describe bytes that one rank writes: `size` bytes from `staging` in its staging buffer to `offset` in a file."""

    file: int
    offset: int
    staging: int
    size: int


def pack_ranges(staging_bytes: int, ranges: Iterable[FileRange]) -> bytes:
    """Encode the message in which a rank reports its ranges to rank 0: rows of 4 int64."""
    return np.array([(staging_bytes, 0, 0, 0), *ranges], dtype=np.int64).tobytes()


class AllRanges:
    """Hold the ranges of all ranks in one table.

    Args:
        layout: the files.
        messages: `pack_ranges` of each rank, in rank order.

    Attributes:
        staging_bytes: size of each rank's staging buffer.
    """

    def __init__(self, layout: Layout, messages: Iterable[bytes]) -> None:
        tables = [np.frombuffer(message, dtype=np.int64).reshape(-1, _COLUMNS) for message in messages]
        self.staging_bytes = [int(table[0, 0]) for table in tables]
        self._layout = layout
        self._table = np.concatenate([table[1:] for table in tables])
        self._firsts = np.cumsum([0, *(len(table) - 1 for table in tables)])
        files, offsets, _, sizes = self._table.T
        self._ranks = np.repeat(np.arange(len(tables), dtype=np.int32), np.diff(self._firsts))
        # The order in the files: sorting by one combined key takes half as long as by two keys.
        begins = np.cumsum([0, *(file.size_bytes for file in layout.files)])
        self._order = np.argsort(begins[files] + offsets).astype(np.int32)
        self._bounds = np.searchsorted(files[self._order], np.arange(len(layout.files) + 1))
        for number, file in enumerate(layout.files):
            mine = self._order[self._bounds[number] : self._bounds[number + 1]]
            ends = np.concatenate([[len(file.header)], offsets[mine] + sizes[mine]])
            # Invariant: the ranges cover the file's data without gaps or overlaps.
            assert ends[-1] == file.size_bytes and np.array_equal(offsets[mine], ends[:-1]), file.name

    def of_rank(self, rank: int) -> list[FileRange]:
        """Return the ranges of one rank, in the order of its staging buffer."""
        return [FileRange(*row) for row in self._table[self._firsts[rank] : self._firsts[rank + 1]].tolist()]

    def records(self, digests: Sequence[bytes]) -> list[FileRecord]:
        """Build the manifest's file entries. `digests` has, for each rank, 16 bytes for each range in its order."""
        every = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES)
        assert len(every) == len(self._table)
        return [self._record(number, every) for number in range(len(self._layout.files))]

    def _record(self, number: int, digests: NDArray[np.uint8]) -> FileRecord:
        file = self._layout.files[number]
        mine = self._order[self._bounds[number] : self._bounds[number + 1]]
        # Rank 0 writes the headers.
        ranges = Ranges(
            [len(file.header), *self._table[mine, 3].tolist()],
            [0, *self._ranks[mine].tolist()],
            bytes.fromhex(digest_of(file.header)) + digests[mine].tobytes(),
        )
        return FileRecord(file.name, file.size_bytes, ranges)
