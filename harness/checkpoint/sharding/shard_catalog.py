"""Collect the shards of all ranks, with tensors that are sharded identically grouped into one kind.

A transformer has thousands of tensors of a dozen shapes, and FSDP2 shards tensors of one shape identically. A rank
therefore reports a dozen patterns, and the pattern's number for each tensor.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.errors import CheckpointError

# (first logical element, number of elements) of each range, independent of its place in the rank's memory.
Part = tuple[tuple[int, int], ...]
# Ranks that hold the same part of the same tensors -> indices of these tensors, ascending.
Sharing = Mapping[tuple[int, ...], Sequence[int]]


@dataclass(frozen=True, eq=False)
class ShardCatalog:
    """Hold the shards of one rank.

    Args:
        structure: `plan.hash_of` its tensors.
        patterns: the distinct tuples of ranges.
        which: index into `patterns` of each tensor: shape (tensors,), int32.
    """

    structure: int
    patterns: tuple[tuple[ElementRange, ...], ...]
    which: NDArray[np.int32]

    @classmethod
    def of(cls, structure: int, ranges: Iterable[tuple[ElementRange, ...]]) -> ShardCatalog:
        """Build the catalog of a rank from its ranges of each tensor."""
        numbers: dict[tuple[ElementRange, ...], int] = {}
        which = [numbers.setdefault(tuple(each), len(numbers)) for each in ranges]
        return cls(structure, tuple(numbers), np.array(which, dtype=np.int32))

    def ranges_of(self, index: int) -> tuple[ElementRange, ...]:
        """Return the ranges of one tensor."""
        return self.patterns[self.which[index]]

    def packed(self) -> bytes:
        """Serialize the catalog, for the exchange between ranks."""
        numbers = array("q", [self.structure, len(self.patterns)])
        for ranges in self.patterns:
            numbers.append(len(ranges))
            for each in ranges:
                numbers.extend(each)
        numbers.insert(0, len(numbers) + 1)
        return zlib.compress(numbers.tobytes() + self.which.tobytes(), 1)

    @classmethod
    def unpacked(cls, content: bytes) -> ShardCatalog:
        """Deserialize a result of `packed`."""
        data = zlib.decompress(content)
        numbers = array("q")
        numbers.frombytes(data[: 8 * int.from_bytes(data[:8], "little")])
        patterns: list[tuple[ElementRange, ...]] = []
        position = 3
        for _ in range(numbers[2]):
            end = position + 1 + 3 * numbers[position]
            values = numbers[position + 1 : end]
            patterns.append(tuple(ElementRange(*values[at : at + 3]) for at in range(0, len(values), 3)))
            position = end
        return cls(numbers[1], tuple(patterns), np.frombuffer(data, dtype=np.int32, offset=8 * len(numbers)))


@dataclass(frozen=True)
class ShardKind:
    """Describe tensors (ascending indices) that are sharded identically. `parts` maps each part to ascending ranks."""

    tensors: Sequence[int]
    parts: Mapping[Part, tuple[int, ...]]


def kinds_of(specs: Sequence[TensorSpec], catalogs: Sequence[ShardCatalog]) -> list[ShardKind]:
    """Group all tensors by kind. `catalogs` has one entry for each rank.

    Raises:
        CheckpointError: if the parts of a tensor leave a gap, or overlap without being identical.
    """
    # Group ranks with equal pattern numbers for all tensors; the patterns themselves may differ.
    rows: dict[bytes, list[int]] = {}
    for rank, each in enumerate(catalogs):
        rows.setdefault(each.which.tobytes(), []).append(rank)
    columns = np.ascontiguousarray(np.stack([np.frombuffer(row, dtype=np.int32) for row in rows], axis=1))
    tensors_of: dict[tuple[bytes, int], list[int]] = {}
    for index, spec in enumerate(specs):
        tensors_of.setdefault((columns[index].tobytes(), spec.num_items), []).append(index)
    members = list(tensors_of.values())
    first_of = np.array([tensors[0] for tensors in members], dtype=np.intp)
    holders: list[dict[Part, list[int]]] = [{} for _ in members]
    for position, ranks in enumerate(rows.values()):
        numbers = columns[first_of, position]
        for rank in ranks:
            parts = [tuple((part.logical, part.num_items) for part in ranges) for ranges in catalogs[rank].patterns]
            is_some = np.array([bool(part) for part in parts], dtype=bool)
            for kind in np.flatnonzero(is_some[numbers]).tolist():
                holders[kind].setdefault(parts[numbers[kind]], []).append(rank)
    for tensors, found in zip(members, holders, strict=True):
        _check_cover(specs[tensors[0]], found)
    return [
        ShardKind(tensors, {part: tuple(ranks) for part, ranks in found.items()})
        for tensors, found in zip(members, holders, strict=True)
    ]


def sharing_of(kinds: Sequence[ShardKind]) -> Sharing:
    """Return the groups of ranks that hold the same parts."""
    found: dict[tuple[int, ...], list[int]] = {}
    for kind in kinds:
        for ranks in kind.parts.values():
            if len(ranks) > 1:
                found.setdefault(ranks, []).extend(kind.tensors)
    return {ranks: sorted(tensors) for ranks, tensors in found.items()}


def _check_cover(spec: TensorSpec, parts: Iterable[Part]) -> None:
    intervals = sorted((start, start + count) for part in parts for start, count in part)
    position = 0
    for start, end in intervals:
        if start != position:
            what = "twice" if start < position else "by no rank"
            raise CheckpointError(
                f"{spec.name}: its elements from {min(start, position)} to {max(start, position)} are held {what}; "
                "this way of sharding is not supported"
            )
        position = end
    if position != spec.num_items:
        raise CheckpointError(
            f"{spec.name}: the ranks hold {position} of its {spec.num_items} elements; "
            "this way of sharding is not supported"
        )
