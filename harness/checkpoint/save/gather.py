"""The way to the disk where ranks share none: each sends its staging memory to rank zero, which writes.

A gloo group of its own, made in the main thread, used from one background thread of each rank. Rank zero
takes the ranks in turn, a chunk at a time, into a window of two: while one is received the other is
written. A sender's chunk waits until rank zero has room for it, so memory is bounded on both sides.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.checkpoint.format.all_ranges import FileRange
from harness.checkpoint.save.direct_io import RangeFile
from harness.checkpoint.save.plan import Plan
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_BYTES = 16 << 20
_NUM_SLOTS = 2


class Gatherer:
    """Moves staging memory to rank zero.

    Effects: collective on its own group, from one background thread of each rank; blocks until rank zero
    has taken everything, each chunk at most `timeout_s`; leaves the ranges' bytes in rank zero's files,
    on the disk itself.

    Args:
        group: a gloo group for this alone.
        rank: this rank.
        timeout_s: limit of the wait for one chunk, in seconds.
    """

    def __init__(self, group: ProcessGroup, rank: int, timeout_s: float) -> None:
        self._group = group
        self._rank = rank
        self._timeout = timedelta(seconds=timeout_s)
        self._slots: list[Tensor] = []
        self._writer: ThreadPoolExecutor | None = None
        self._broken: str | None = None

    def send(self, memory: Tensor, size_bytes: int) -> None:
        """Every rank but zero: send the first `size_bytes` of its staging memory.

        Args:
            memory: shape (bytes,), uint8, in host memory.
            size_bytes: how much of it, which rank zero knows from the plan.

        Raises:
            CheckpointError: if rank zero does not take it in time.
        """
        self._require_connection()
        for begin, end in _chunks(size_bytes):
            self._await(self._group.send([memory[begin:end]], 0, 0), "rank 0 to take a part of the checkpoint")

    def receive(self, plan: Plan, directory: Path | None) -> None:
        """Rank zero: receive every other rank's memory, and write it; without a directory it is dropped.

        Raises:
            CheckpointError: if a rank does not send in time.
            OSError: if the disk refuses; what the ranks send is taken all the same, so that none waits.
        """
        self._require_connection()
        if not self._slots:
            # Of whole pages, as the senders' memory: what the disk takes directly there, it takes from here.
            self._slots = [torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8) for _ in range(_NUM_SLOTS)]
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="harness-gather")
        assert self._writer is not None
        all_ranges = plan.all_ranges
        assert all_ranges is not None
        files: list[RangeFile] = []
        writing: list[Future[None] | None] = [None] * _NUM_SLOTS
        failures: list[BaseException] = []
        turn = 0
        if directory is not None:
            try:
                for file in plan.layout.files:
                    files.append(RangeFile(directory / file.name))
            except OSError as error:
                failures.append(error)
        try:
            for rank, size_bytes in enumerate(all_ranges.staging_bytes):
                if rank == 0:
                    continue
                ranges = all_ranges.of_rank(rank)
                for begin, end in _chunks(size_bytes):
                    slot = turn % _NUM_SLOTS
                    turn += 1
                    _settle(writing[slot], failures)
                    part = self._slots[slot][: end - begin]
                    self._await(self._group.recv([part], rank, 0), f"rank {rank} to send its part of the checkpoint")
                    if directory is not None and not failures:
                        writing[slot] = self._writer.submit(_write, files, part, ranges, begin, end)
            for future in writing:
                _settle(future, failures)
            for output in files:
                output.sync()
        finally:
            # A write that runs still needs its file.
            wait([future for future in writing if future is not None])
            for output in files:
                output.close()
        if failures:
            raise failures[0]

    def _await(self, work: object, what: str) -> None:
        try:
            work.wait(self._timeout)  # type: ignore[attr-defined]
        except RuntimeError as error:
            # gloo closes the connection, so there is nothing to be waited for another time.
            self._broken = f"waited for {what}: {str(error).splitlines()[0]}"
            raise CheckpointError(self._broken) from error

    def _require_connection(self) -> None:
        if self._broken is not None:
            raise CheckpointError(f"the connection to rank 0 is lost since an earlier save: {self._broken}")


def _chunks(size_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size_bytes, CHUNK_BYTES):
        yield begin, min(begin + CHUNK_BYTES, size_bytes)


def _settle(future: Future[None] | None, failures: list[BaseException]) -> None:
    if future is not None and (error := future.exception()) is not None:
        failures.append(error)


def _write(files: Sequence[RangeFile], part: Tensor, ranges: Sequence[FileRange], begin: int, end: int) -> None:
    """Write the bytes `begin` to `end` of a rank's memory, which `part` holds, where they belong."""
    data = memoryview(part.numpy())  # type: ignore[arg-type]
    for file, first, last, offset in places(ranges, begin, end):
        files[file].write(data, first - begin, last - begin, offset)


def places(ranges: Sequence[FileRange], begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Where the bytes `begin` to `end` of a rank's memory belong: file, first and last of them, byte in the file."""
    position = bisect_right(ranges, begin, key=lambda part: part.staging + part.size)
    while position < len(ranges) and ranges[position].staging < end:
        file, offset, staging, size = ranges[position]
        first, last = max(begin, staging), min(end, staging + size)
        yield file, first, last, offset + first - staging
        position += 1
