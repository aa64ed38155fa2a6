"""The digests of a file's ranges: what is known of them as the bytes come by, and what several ranks know together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.checkpoint.format.commit import FileRecord, Range
from harness.checkpoint.format.digest import LEAF_BYTES, in_hex, leaves_of, num_leaves
from harness.checkpoint.format.ranges import number_at
from harness.errors import DamagedError


class Span(NamedTuple):
    """Leaves of a range, from `first` to before `end`, that have come by, and what they have in its digest."""

    first: int
    end: int
    digest: int


class Leaves(NamedTuple):
    """Leaves of a file's range, of that number, from `first` to before `end`."""

    number: int
    first: int
    end: int


class Digests:
    """What is known of the digests of a file's ranges, as their bytes come by.

    Attributes:
        spans: as those of `Reading`.
    """

    def __init__(self, path: Path, ranges: Sequence[Range]) -> None:
        self._path = path
        self._ranges = ranges
        # Of the leaf that has begun and not ended: where it goes on.
        self._begun = bytearray()
        self._goes_on = -1
        self.spans: dict[int, list[Span]] = {}

    def add(self, start: int, data: memoryview) -> None:
        """Bytes from `start` on; whoever calls this goes through the file, and may go back."""
        end = start + len(data)
        for number in range(number_at(self._ranges, start), len(self._ranges)):
            part = self._ranges[number]
            if part.start >= end:
                return
            first, last = max(start, part.start), min(end, part.end)
            if first < last:
                self._add(number, part, first, data[first - start : last - start])

    def _add(self, number: int, part: Range, start: int, data: memoryview) -> None:
        """Bytes that are all of one range."""
        leaf, of_leaf = divmod(start - part.start, LEAF_BYTES)
        if of_leaf:
            rest = data[: LEAF_BYTES - of_leaf]
            data = data[len(rest) :]
            if start == self._goes_on:
                self._begun += rest
                self._goes_on += len(rest)
                if len(self._begun) < LEAF_BYTES and self._goes_on < part.end:
                    return
                self._know(number, leaf, leaf + 1, memoryview(self._begun))
                self._goes_on = -1
            # Else the leaf's beginning is not known.
            leaf += 1
        at_end = part.start + leaf * LEAF_BYTES + len(data) == part.end
        size_bytes = len(data) if at_end else len(data) - len(data) % LEAF_BYTES
        if size_bytes:
            self._know(number, leaf, leaf + num_leaves(size_bytes), data[:size_bytes])
        if size_bytes < len(data):
            self._begun = bytearray(data[size_bytes:])
            self._goes_on = part.start + leaf * LEAF_BYTES + len(data)

    def _know(self, number: int, first: int, end: int, data: memoryview) -> None:
        """Whole leaves; those that have come by before are left out."""
        spans = self.spans.setdefault(number, [])
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
        part = self._ranges[number]
        if last.first == 0 and end == num_leaves(part.end - part.start):
            require_digest(self._path, part, last.digest)


def known_whole(record: FileRecord, spans: Mapping[int, Sequence[Span]]) -> list[bool]:
    """Of each range of a file, whether all of it has come by here, and was what was written."""
    found = [False] * len(record.ranges)
    for number, parts in spans.items():
        part = record.ranges[number]
        found[number] = parts[0].first == 0 and parts[0].end == num_leaves(part.end - part.start)
    return found


def joined(
    record: FileRecord, numbers: Iterable[int], readings: Sequence[Mapping[int, Sequence[Span]]]
) -> tuple[dict[int, int], list[Leaves]]:
    """What all ranks together know of some ranges of a file: each one's digest, and the leaves that it lacks.

    Args:
        record: what the manifest says of the file.
        numbers: of the ranges.
        readings: of each rank, as `Reading.spans`.
    """
    told: dict[int, list[Span]] = {number: [] for number in numbers}
    for spans in readings:
        for number, of_rank in spans.items():
            if number in told:
                told[number].extend(of_rank)
    digests, lacking = {}, []
    for number, parts in told.items():
        part = record.ranges[number]
        reached = digest = 0
        # Each leaf counts once, however many ranks hold it; who knows the most comes first.
        for span in sorted(parts, key=lambda span: (span.first, -span.end)):
            if span.first < reached:
                continue
            if span.first > reached:
                lacking.append(Leaves(number, reached, span.first))
            reached = span.end
            digest ^= span.digest
        if reached < (end := num_leaves(part.end - part.start)):
            lacking.append(Leaves(number, reached, end))
        digests[number] = digest
    return digests, lacking


def require_digest(path: Path, part: Range, digest: int) -> None:
    """Refuse a range that is not what was written.

    Raises:
        DamagedError: if it is not.
    """
    if in_hex(digest) != part.digest:
        raise DamagedError(
            f"{path}: bytes {part.start} to {part.end}, written by rank {part.rank}, are not what was written; use "
            "another checkpoint"
        )
