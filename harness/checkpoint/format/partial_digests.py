"""Compute the digests of a file's ranges from the parts that one or several ranks have read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import LEAF_BYTES, in_hex, leaves_of, num_leaves
from harness.checkpoint.format.ranges import Range, Ranges
from harness.errors import DamagedError


class Span(NamedTuple):
    """Record that leaves `first` to `end` (exclusive) of a range were read; `digest` is the XOR of their hashes."""

    first: int
    end: int
    digest: int


class LeafRange(NamedTuple):
    """Identify leaves `first` to `end` (exclusive) of the range with index `range`."""

    range: int
    first: int
    end: int


class PartialDigests:
    """Update the digests of one file's ranges while its bytes are read.

    Attributes:
        spans: index of a range -> leaves that were read, in order.
    """

    def __init__(self, path: Path, ranges: Ranges) -> None:
        self._path = path
        self._ranges = ranges
        # Bytes of a leaf that was read in part, and the file offset of the next byte.
        self._open_leaf = bytearray()
        self._next_byte = -1
        self.spans: dict[int, list[Span]] = {}

    def add(self, start: int, data: memoryview) -> None:
        """Add the bytes of the file that begin at `start`. Calls must be in file order, but may repeat bytes.

        Raises:
            DamagedError: if a range is completely read and its digest is wrong.
        """
        end = start + len(data)
        for index in range(self._ranges.index_at(start), len(self._ranges)):
            part = self._ranges[index]
            if part.start >= end:
                return
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                self._add(index, part, first, data[first - start : last - start])

    def _add(self, index: int, part: Range, start: int, data: memoryview) -> None:
        leaf, offset_in_leaf = divmod(start - part.start, LEAF_BYTES)
        if offset_in_leaf:
            rest = data[: LEAF_BYTES - offset_in_leaf]
            data = data[len(rest) :]
            if start == self._next_byte:
                self._open_leaf += rest
                self._next_byte += len(rest)
                if len(self._open_leaf) < LEAF_BYTES and self._next_byte < part.end:
                    return
                self._add_leaves(index, leaf, leaf + 1, memoryview(self._open_leaf))
                self._next_byte = -1
            # Otherwise the start of the leaf was not read, so the leaf is skipped.
            leaf += 1
        is_to_end = part.start + leaf * LEAF_BYTES + len(data) == part.end
        size_bytes = len(data) if is_to_end else len(data) - len(data) % LEAF_BYTES
        if size_bytes:
            self._add_leaves(index, leaf, leaf + num_leaves(size_bytes), data[:size_bytes])
        if size_bytes < len(data):
            self._open_leaf = bytearray(data[size_bytes:])
            self._next_byte = part.start + leaf * LEAF_BYTES + len(data)

    def _add_leaves(self, index: int, first: int, end: int, data: memoryview) -> None:
        """Add whole leaves, skipping those already added."""
        spans = self.spans.setdefault(index, [])
        last = spans[-1] if spans else Span(0, 0, 0)
        if spans and first < last.end:
            data = data[(last.end - first) * LEAF_BYTES :]
            first = last.end
        if first >= end:
            return
        digest = leaves_of(data, first)
        if spans and first == last.end:
            spans[-1] = last = Span(last.first, end, last.digest ^ digest)
        else:
            last = Span(first, end, digest)
            spans.append(last)
        part = self._ranges[index]
        if last.first == 0 and end == num_leaves(part.end - part.start):
            require_digest(self._path, part, last.digest)


def are_complete(record: FileRecord, spans: Mapping[int, Sequence[Span]]) -> list[bool]:
    """Return, for each range of a file, whether this rank has read all of it and so verified its digest."""
    found = [False] * len(record.ranges)
    for index, parts in spans.items():
        part = record.ranges[index]
        found[index] = parts[0].first == 0 and parts[0].end == num_leaves(part.end - part.start)
    return found


def combine(
    record: FileRecord, indices: Iterable[int], spans_by_rank: Sequence[Mapping[int, Sequence[Span]]]
) -> tuple[dict[int, int], list[LeafRange]]:
    """Combine the digests of the ranges with these indices over the `PartialDigests.spans` of all ranks.

    Returns:
        A map from the index of a range to its digest so far, and the leaves that no rank has read.
    """
    read: dict[int, list[Span]] = {index: [] for index in indices}
    for spans in spans_by_rank:
        for index, of_rank in spans.items():
            if index in read:
                read[index].extend(of_rank)
    digests, missing = {}, []
    for index, parts in read.items():
        part = record.ranges[index]
        reached = digest = 0
        # Count each leaf once. The longest of the spans with the same start is sorted first.
        for span in sorted(parts, key=lambda span: (span.first, -span.end)):
            if span.first < reached:
                continue
            if span.first > reached:
                missing.append(LeafRange(index, reached, span.first))
            reached = span.end
            digest ^= span.digest
        if reached < (end := num_leaves(part.end - part.start)):
            missing.append(LeafRange(index, reached, end))
        digests[index] = digest
    return digests, missing


def require_digest(path: Path, part: Range, digest: int) -> None:
    """Raise `DamagedError` if the digest of a range is not that of the manifest."""
    if in_hex(digest) != part.digest:
        raise DamagedError(
            f"{path}: bytes {part.start} to {part.end}, written by rank {part.rank}, are not what was written; use "
            "another checkpoint"
        )
