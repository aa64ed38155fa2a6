"""Reading the bytes that a rank wants out of one file, with the digests of what it has read whole.

A digest covers a range of a file, of which a rank on another topology may want a part only. A range of which all
is wanted is checked here, at no cost but the hashing; of the others the ranks put together what each knows
(`partial_digests.combine`), and read once more what none knows: the leaves that lie across a border.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import LEAF_BYTES, leaves_of
from harness.checkpoint.format.files import Files, LocalFiles
from harness.checkpoint.format.partial_digests import LeafRange, PartialDigests, Span
from harness.checkpoint.format.tensor_shard import DTYPES

# What is hashed is still in the core's cache; the kernel reads on meanwhile.
CHUNK_BYTES = 512 << 10
_LEAVES_OF_CHUNK = CHUNK_BYTES // LEAF_BYTES


class Want(NamedTuple):
    """Elements of a file that a rank wants.

    Args:
        start: their first byte in the file.
        dtype: that they are stored as, by safetensors' name.
        target: shape (num_items,), stride 1, of any type and on any device: they are cast where the types
            differ.
    """

    start: int
    dtype: str
    target: Tensor

    @property
    def end(self) -> int:
        """Byte after the last."""
        return self.start + self.target.numel() * self.item_bytes

    @property
    def item_bytes(self) -> int:
        """Of one element in the file."""
        return DTYPES[self.dtype].itemsize

    def part(self, start: int, end: int) -> Want:
        """The elements from byte `start` of the file to before `end`."""
        first, last = ((byte - self.start) // self.item_bytes for byte in (start, end))
        return Want(start, self.dtype, self.target[first:last])


@dataclass
class Reading:
    """What came of reading one file.

    Attributes:
        read_bytes: from the file.
        spans: by number of the range, what is known of its digest; one that was read whole is what was written.
    """

    read_bytes: int = 0
    spans: dict[int, list[Span]] = field(default_factory=dict)


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
    digests = PartialDigests(path, record.ranges)
    scratch = bytearray(CHUNK_BYTES)
    found = Reading()
    pieces = list(_once(wants))
    with (files or LocalFiles(path.parent)).opened(path.name) as file:
        for same, reading_on_to in zip(pieces, _ends([same[0] for same in pieces]), strict=True):
            start, dtype, item = same[0].start, DTYPES[same[0].dtype], same[0].item_bytes
            targets = [want.target for want in same]
            direct = next((target for target in targets if target.dtype == dtype and _bytes_of(target)), None)
            memory = None if direct is None else _bytes_of(direct)
            num_items = CHUNK_BYTES // item
            for first in range(0, len(targets[0]), num_items):
                last = min(first + num_items, len(targets[0]))
                if memory is None:
                    part = memoryview(scratch)[: (last - first) * item]
                else:
                    part = memory[first * item : last * item]
                file.fill(part, start + first * item, reading_on_to)
                digests.add(start + first * item, part)
                found.read_bytes += len(part)
                for target in targets:
                    if target is not direct:
                        target[first:last].copy_(torch.frombuffer(part, dtype=dtype))
    found.spans = digests.spans
    return found


def _ends(ordered: Sequence[Want]) -> list[int]:
    """For each want, the end of those that follow it without a gap."""
    ends = [want.end for want in ordered]
    for position in range(len(ordered) - 2, -1, -1):
        if ordered[position].end == ordered[position + 1].start:
            ends[position] = ends[position + 1]
    return ends


def unique_bytes(wants: Iterable[Want]) -> int:
    """Bytes of the file that are wanted, once or several times."""
    found = reached = 0
    for want in sorted(wants, key=lambda want: want.start):
        found += max(0, want.end - max(want.start, reached))
        reached = max(reached, want.end)
    return found


def _once(wants: Iterable[Want]) -> Iterator[list[Want]]:
    """The wants in the order of the file, cut such that what several want, as a weight and its master, is together."""
    overlapping: list[Want] = []
    end = 0
    for want in sorted(wants, key=lambda want: want.start):
        first = overlapping[0] if overlapping else want
        if want.start >= end or want.dtype != first.dtype or (want.start - first.start) % want.item_bytes:
            yield from _cut(overlapping)
            overlapping, end = [], want.end
        overlapping.append(want)
        end = max(end, want.end)
    yield from _cut(overlapping)


def _cut(overlapping: Sequence[Want]) -> Iterator[list[Want]]:
    borders = {border for want in overlapping for border in (want.start, want.end)}
    for start, end in pairwise(sorted(borders)):
        yield [want.part(start, end) for want in overlapping if want.start <= start and end <= want.end]


def digest_leaves(
    path: Path, record: FileRecord, leaves: Iterable[LeafRange], files: Files | None = None
) -> tuple[int, list[int]]:
    """Read some leaves for their digests alone: the number of bytes, and what each of the given has in its range's.

    Effects: as `read`'s.

    Raises:
        DamagedError, CheckpointError: as `read`.
    """
    scratch = memoryview(bytearray(CHUNK_BYTES))
    read_bytes, found = 0, []
    with (files or LocalFiles(path.parent)).opened(path.name) as file:
        for number, first, end in leaves:
            part = record.ranges[number]
            digest = 0
            for leaf in range(first, end, _LEAVES_OF_CHUNK):
                start = part.start + leaf * LEAF_BYTES
                stop = min(part.end, part.start + min(end, leaf + _LEAVES_OF_CHUNK) * LEAF_BYTES)
                chunk = scratch[: stop - start]
                file.fill(chunk, start, min(part.end, part.start + end * LEAF_BYTES))
                digest ^= leaves_of(chunk, leaf)
                read_bytes += len(chunk)
            found.append(digest)
    return read_bytes, found


def _bytes_of(target: Tensor) -> memoryview | None:
    """Its memory, where a file can be read straight into it."""
    if target.device.type != "cpu" or not target.numel():
        return None
    return memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
