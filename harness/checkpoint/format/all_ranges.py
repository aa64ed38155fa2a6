"""The bytes of each file that each rank writes, for all ranks, as a table that rank 0 keeps."""

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
    """Bytes of a file that one rank writes from its staging memory; all in bytes."""

    file: int
    offset: int
    staging: int
    size: int


def pack_ranges(staging_bytes: int, ranges: Iterable[FileRange]) -> bytes:
    """The message in which a rank reports its ranges to rank 0."""
    return np.array([(staging_bytes, 0, 0, 0), *ranges], dtype=np.int64).tobytes()


class AllRanges:
    """The ranges of every rank.

    Args:
        layout: the files.
        messages: from each rank, by `pack_ranges`.

    Attributes:
        staging_bytes: size of each rank's staging memory.
    """

    def __init__(self, layout: Layout, messages: Iterable[bytes]) -> None:
        tables = [np.frombuffer(message, dtype=np.int64).reshape(-1, _COLUMNS) for message in messages]
        self.staging_bytes = [int(table[0, 0]) for table in tables]
        self._layout = layout
        self._table = np.concatenate([table[1:] for table in tables])
        self._firsts = np.cumsum([0, *(len(table) - 1 for table in tables)])
        files, offsets, _, sizes = self._table.T
        self._ranks = np.repeat(np.arange(len(tables), dtype=np.int32), np.diff(self._firsts))
        # The order in the files. Sorting by one number takes half as long as by two.
        begins = np.cumsum([0, *(file.size_bytes for file in layout.files)])
        self._order = np.argsort(begins[files] + offsets).astype(np.int32)
        self._bounds = np.searchsorted(files[self._order], np.arange(len(layout.files) + 1))
        for number, file in enumerate(layout.files):
            mine = self._order[self._bounds[number] : self._bounds[number + 1]]
            ends = np.concatenate([[len(file.header)], offsets[mine] + sizes[mine]])
            # An internal invariant; the check is cheap compared with a wrong file.
            assert ends[-1] == file.size_bytes and np.array_equal(offsets[mine], ends[:-1]), file.name

    def of_rank(self, rank: int) -> list[FileRange]:
        """The ranges of one rank, in the order of its staging memory."""
        return [FileRange(*row) for row in self._table[self._firsts[rank] : self._firsts[rank + 1]].tolist()]

    def records(self, digests: Sequence[bytes]) -> list[FileRecord]:
        """The manifest's entries for the files of tensors.

        Args:
            digests: of each rank's ranges, in its order, 16 bytes each.
        """
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
