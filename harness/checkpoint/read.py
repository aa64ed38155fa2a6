"""Reading the bytes that a rank wants out of one file, with the digests of what it has read whole.

A digest covers a range of a file, of which a rank on another topology may want a part only. So a range is
checked here where all of it is wanted, at no cost but the hashing, and the ranks divide what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import Tensor

from harness.checkpoint.commit import FileRecord, Range
from harness.checkpoint.files import Files, LocalFiles
from harness.checkpoint.shards.source import DTYPES
from harness.errors import DamagedError

# What is hashed is still in the core's cache; the kernel reads on meanwhile.
CHUNK_BYTES = 512 << 10


class Want(NamedTuple):
    """Elements of a file that a rank wants.

    Args:
        start: their first byte in the file.
        dtype: that they are stored as, by safetensors' name.
        target: shape (num_items,), contiguous, of any type and on any device: they are cast where the types
            differ.
    """

    start: int
    dtype: str
    target: Tensor

    @property
    def end(self) -> int:
        """Byte after the last."""
        return self.start + self.target.numel() * DTYPES[self.dtype].itemsize


@dataclass
class Reading:
    """What came of reading one file.

    Attributes:
        read_bytes: from the file.
        unchecked: numbers of the ranges that were not read whole, so that their digests are not checked.
    """

    read_bytes: int = 0
    unchecked: list[int] = field(default_factory=list)


def read(path: Path, record: FileRecord, wants: Iterable[Want], files: Files | None = None) -> Reading:
    """Fill the targets.

    Effects: not collective; any thread; blocks for reading; nothing on disk; at most 512 KiB of memory beside
    the targets. After an error the targets hold anything.

    Args:
        path: of the file.
        record: what the manifest says of it.
        wants: in any order.
        files: where it is read from; None: this node's disk.

    Raises:
        DamagedError: if a range is not what was written, or the file is cut off or not there.
        CheckpointError: if the disk does not give it.
    """
    digests = _Digests(path, record.ranges)
    scratch = bytearray(CHUNK_BYTES)
    found = Reading()
    ordered = sorted(wants, key=lambda want: want.start)
    with (files or LocalFiles(path.parent)).opened(path.name) as file:
        for want, reading_on_to in zip(ordered, _ends(ordered), strict=True):
            item = DTYPES[want.dtype].itemsize
            num_items = CHUNK_BYTES // item
            straight = _bytes_of(want.target) if want.target.dtype == DTYPES[want.dtype] else None
            for first in range(0, want.target.numel(), num_items):
                last = min(first + num_items, want.target.numel())
                size_bytes = (last - first) * item
                if straight is None:
                    part = memoryview(scratch)[:size_bytes]
                else:
                    part = straight[first * item : first * item + size_bytes]
                file.fill(part, want.start + first * item, reading_on_to)
                digests.add(want.start + first * item, part)
                found.read_bytes += size_bytes
                if straight is None:
                    want.target[first:last].copy_(torch.frombuffer(part, dtype=DTYPES[want.dtype]))
    found.unchecked = digests.unchecked()
    return found


def _ends(ordered: Sequence[Want]) -> list[int]:
    """For each want, the end of those that follow it without a gap."""
    ends = [want.end for want in ordered]
    for position in range(len(ordered) - 2, -1, -1):
        if ordered[position].end == ordered[position + 1].start:
            ends[position] = ends[position + 1]
    return ends


def check_ranges(path: Path, record: FileRecord, numbers: Sequence[int], files: Files | None = None) -> int:
    """Read some ranges of a file for their digests alone; the number of bytes.

    Effects: as `read`'s.

    Raises:
        DamagedError, CheckpointError: as `read`.
    """
    digests = _Digests(path, record.ranges)
    scratch = memoryview(bytearray(CHUNK_BYTES))
    read_bytes = 0
    with (files or LocalFiles(path.parent)).opened(path.name) as file:
        for number in numbers:
            part = record.ranges[number]
            for start in range(part.start, part.end, CHUNK_BYTES):
                chunk = scratch[: min(CHUNK_BYTES, part.end - start)]
                file.fill(chunk, start, part.end)
                digests.add(start, chunk)
                read_bytes += len(chunk)
    return read_bytes


class _Digests:
    """The digests of a file's ranges, as their bytes come by."""

    def __init__(self, path: Path, ranges: Sequence[Range]) -> None:
        self._path = path
        self._ranges = ranges
        self._begun: dict[int, xxhash.xxh3_128] = {}
        self._reached = [part.start for part in ranges]
        self._number = 0

    def add(self, start: int, data: memoryview) -> None:
        """Bytes from `start` on; those that do not follow what came before are left out."""
        end = start + len(data)
        # They come nearly in order: from where the last began.
        while self._number > 0 and self._ranges[self._number].start > start:
            self._number -= 1
        while self._number < len(self._ranges) - 1 and self._ranges[self._number].end <= start:
            self._number += 1
        for number in range(self._number, len(self._ranges)):
            part = self._ranges[number]
            if part.start >= end:
                return
            reached, last = self._reached[number], min(end, part.end)
            if start <= reached < last:
                digest = self._begun.setdefault(number, xxhash.xxh3_128())
                digest.update(data[reached - start : last - start])
                self._reached[number] = last
                if last == part.end and self._begun.pop(number).hexdigest() != part.digest:
                    raise DamagedError(
                        f"{self._path}: bytes {part.start} to {part.end}, written by rank {part.rank}, are not what "
                        "was written; use another checkpoint"
                    )

    def unchecked(self) -> list[int]:
        """Numbers of the ranges that did not come by as a whole."""
        return [number for number, part in enumerate(self._ranges) if self._reached[number] != part.end]


def _bytes_of(target: Tensor) -> memoryview | None:
    """Its memory, where a file can be read straight into it."""
    if target.device.type != "cpu" or not target.numel():
        return None
    return memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
