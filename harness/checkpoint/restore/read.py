"""Reads the bytes that a rank needs of one file, and computes digests of what it reads.

A digest covers a range of a file, of which a rank on another topology may need a part only. A range that is read whole
is checked here, at the cost of the hashing only. For the others the ranks combine what each has computed
(`partial_digests.combine`), and read once more the leaves that lie across a border.
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

# Small enough that the bytes to be hashed are still in the core's cache, while the kernel reads ahead.
CHUNK_BYTES = 512 << 10
_LEAVES_OF_CHUNK = CHUNK_BYTES // LEAF_BYTES


class ReadRequest(NamedTuple):
    """Elements of a file that a rank needs.

    Args:
        start: their first byte in the file.
        dtype: in the file, by safetensors' name.
        target: shape (num_items,), stride 1, any dtype and device; elements are cast if the dtypes differ.
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
        """Size of an element in the file."""
        return DTYPES[self.dtype].itemsize

    def part(self, start: int, end: int) -> ReadRequest:
        """Return a request for the elements from byte `start` of the file to before `end`."""
        first, last = ((byte - self.start) // self.item_bytes for byte in (start, end))
        return ReadRequest(start, self.dtype, self.target[first:last])


@dataclass
class ReadResult:
    """The result of reading one file.

    Attributes:
        read_bytes: number of bytes.
        spans: index of a range -> the known parts of its digest. A range that was read whole has been checked.
    """

    read_bytes: int = 0
    spans: dict[int, list[Span]] = field(default_factory=dict)


def read(path: Path, record: FileRecord, requests: Iterable[ReadRequest], files: Files | None = None) -> ReadResult:
    """Read the requested elements into their targets.

    Effects: not collective; any thread; blocks for reading; nothing on disk; at most 512 KiB of memory beside
    the targets. After an error the targets are undefined.

    Args:
        path: of the file.
        record: of the manifest.
        requests: in any order.
        files: its source; None: this node's disk.

    Raises:
        DamagedError: if a range differs from its digest, or the file is truncated or missing.
        CheckpointError: if the file cannot be read.
    """
    digests = PartialDigests(path, record.ranges)
    scratch = bytearray(CHUNK_BYTES)
    found = ReadResult()
    pieces = list(_grouped(requests))
    with (files or LocalFiles(path.parent)).opened(path.name) as file:
        for same, reading_on_to in zip(pieces, _ends([same[0] for same in pieces]), strict=True):
            start, dtype, item = same[0].start, DTYPES[same[0].dtype], same[0].item_bytes
            targets = [request.target for request in same]
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


def _ends(ordered: Sequence[ReadRequest]) -> list[int]:
    """Return for each request the end of the requests that follow it without a gap."""
    ends = [request.end for request in ordered]
    for position in range(len(ordered) - 2, -1, -1):
        if ordered[position].end == ordered[position + 1].start:
            ends[position] = ends[position + 1]
    return ends


def unique_bytes(requests: Iterable[ReadRequest]) -> int:
    """Return the number of bytes requested, each byte counted once."""
    found = reached = 0
    for request in sorted(requests, key=lambda request: request.start):
        found += max(0, request.end - max(request.start, reached))
        reached = max(reached, request.end)
    return found


def _grouped(requests: Iterable[ReadRequest]) -> Iterator[list[ReadRequest]]:
    """Yield the requests in file order, cut so that overlapping ones, as of a weight and its master, are together."""
    overlapping: list[ReadRequest] = []
    end = 0
    for request in sorted(requests, key=lambda request: request.start):
        first = overlapping[0] if overlapping else request
        if request.start >= end or request.dtype != first.dtype or (request.start - first.start) % request.item_bytes:
            yield from _cut(overlapping)
            overlapping, end = [], request.end
        overlapping.append(request)
        end = max(end, request.end)
    yield from _cut(overlapping)


def _cut(overlapping: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    borders = {border for request in overlapping for border in (request.start, request.end)}
    for start, end in pairwise(sorted(borders)):
        yield [request.part(start, end) for request in overlapping if request.start <= start and end <= request.end]


def digest_leaves(
    path: Path, record: FileRecord, leaves: Iterable[LeafRange], files: Files | None = None
) -> tuple[int, list[int]]:
    """Read leaves only for their digests. Returns the number of bytes, and each leaf range's part of its digest.

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
    """Return the memory of a target that a file can be read into directly, or None."""
    if target.device.type != "cpu" or not target.numel():
        return None
    return memoryview(target.detach().view(torch.uint8).numpy())  # type: ignore[arg-type]
