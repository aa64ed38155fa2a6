"""From what each rank holds to what each rank writes: every byte by exactly one rank.

    holdings of all ranks  ->  owners  ->  ranges of files, and where they lie in each rank's memory

Every rank computes all of it alike, from the same exchange: who writes what needs no further word.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import xxhash

from harness.agreement import Agreement
from harness.checkpoint.direct_io import MIN_DIRECT_BYTES, PAGE_BYTES
from harness.checkpoint.layout import Layout, TensorSpec, plan_layout
from harness.checkpoint.replicas import check_replicas
from harness.checkpoint.shards.held import Held
from harness.checkpoint.shards.source import Run
from harness.errors import CheckpointError

# A digest is of at most so many bytes, so that a part of a large file can be verified by itself, and is
# written while the next is copied.
MAX_RANGE_BYTES = 16 << 20
# No type of safetensors has larger elements.
_ELEMENT_ALIGNMENT_BYTES = 16


class Piece(NamedTuple):
    """What a rank copies: elements of one tensor, to a place in its staging memory.

    `source` counts `Held.sources`; `local` and `num_items` are in elements, `staging` in bytes.
    """

    source: int
    local: int
    num_items: int
    staging: int


class FileRange(NamedTuple):
    """Bytes of a file that one rank writes from its staging memory; all in bytes."""

    file: int
    offset: int
    staging: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Who writes what, the same on every rank except for `pieces`.

    Args:
        layout: files and places.
        pieces: what this rank copies.
        staging_bytes: how much memory that takes, for each rank.
        ranges: for each rank, in the order of its staging memory.
    """

    layout: Layout
    pieces: tuple[Piece, ...]
    staging_bytes: tuple[int, ...]
    ranges: tuple[tuple[FileRange, ...], ...]


def make_plan(held: Held, agreement: Agreement, max_shard_size_bytes: int | None) -> Plan:
    """Plan a checkpoint of what all ranks hold.

    Effects: collective; main thread; blocks until every rank has planned; nothing on disk.

    Args:
        held: what this rank holds.
        agreement: of all ranks.
        max_shard_size_bytes: limit of one file of weights, or None.

    Raises:
        CheckpointError: on all ranks alike, if they hold different tensors, if bytes are held by none, if
            ranks hold parts that overlap without being the same, or the same part with other values.
    """
    specs = tuple(source.spec for source in held.sources)
    mine = Holdings(hash_of(specs, held.aliases), [source.runs for source in held.sources])
    packed = agreement.gather("what each rank holds", mine.packed())
    holdings = [Holdings.unpacked(part) for part in packed]
    plan = plan_of(specs, held.aliases, holdings, agreement.rank, max_shard_size_bytes)
    check_replicas(held.sources, [part.runs for part in holdings], agreement)
    return plan


def plan_of(
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    holdings: Sequence[Holdings],
    rank: int,
    max_shard_size_bytes: int | None,
) -> Plan:
    """The plan for one rank, given what all of them hold. Not collective; see `make_plan`."""
    for other, part in enumerate(holdings):
        if part.structure != holdings[0].structure:
            raise CheckpointError(
                f"rank {other} has other tensors than rank 0, so their parts do not make one checkpoint; the model "
                "and the optimizer must be made alike on all ranks"
            )
    layout = plan_layout(specs, aliases, max_shard_size_bytes)
    owned = assign(specs, [part.runs for part in holdings])
    pieces: list[Piece] = []
    ranges: list[tuple[FileRange, ...]] = []
    staging_bytes: list[int] = []
    for owner, runs in enumerate(owned):
        own_pieces, own_ranges, size = _stage(specs, layout, runs)
        ranges.append(tuple(own_ranges))
        staging_bytes.append(size)
        if owner == rank:
            pieces = own_pieces
    return Plan(layout, tuple(pieces), tuple(staging_bytes), tuple(ranges))


def hash_of(specs: Iterable[TensorSpec], aliases: Mapping[str, str]) -> int:
    """A number that differs where tensors or aliases do; the same in every process."""
    digest = xxhash.xxh3_64()
    for spec in specs:
        digest.update(f"{spec.section}\0{spec.name}\0{spec.dtype}\0{spec.shape}\1".encode())
    for alias, first in aliases.items():
        digest.update(f"{alias}\0{first}\1".encode())
    return digest.intdigest() >> 1  # so that it fits a signed number


@dataclass(frozen=True)
class Holdings:
    """What one rank holds.

    Args:
        structure: `hash_of` its tensors.
        runs: for each tensor.
    """

    structure: int
    runs: Sequence[tuple[Run, ...]]

    def packed(self) -> bytes:
        """As bytes, for the exchange."""
        numbers = array("q", [self.structure])
        for runs in self.runs:
            numbers.append(len(runs))
            for run in runs:
                numbers.extend(run)
        return numbers.tobytes()

    @classmethod
    def unpacked(cls, data: bytes) -> Holdings:
        """What `packed` made."""
        numbers = array("q")
        numbers.frombytes(data)
        runs: list[tuple[Run, ...]] = []
        position = 1
        while position < len(numbers):
            end = position + 1 + 3 * numbers[position]
            values = numbers[position + 1 : end]
            runs.append(tuple(Run(*values[at : at + 3]) for at in range(0, len(values), 3)))
            position = end
        return cls(numbers[0], runs)


def assign(specs: Sequence[TensorSpec], held: Sequence[Sequence[tuple[Run, ...]]]) -> list[dict[int, tuple[Run, ...]]]:
    """Give each element to one of the ranks that hold it.

    Ranks that hold the same parts of the same tensors (DDP's, HSDP's replicas) divide the bytes of those
    tensors among them, evenly, as one stream: nobody copies or writes what another does.

    Args:
        specs: of the tensors.
        held: for each rank, for each tensor: what it holds.

    Returns:
        For each rank: index of the tensor -> what it owns.

    Raises:
        CheckpointError: if the ranks' parts leave a gap, or overlap without being the same.
    """
    owned: list[dict[int, tuple[Run, ...]]] = [{} for _ in held]
    # Ranks with the same part -> the tensors of which they hold such a part, and the part's length.
    shared: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for index, spec in enumerate(specs):
        holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
        for rank, parts in enumerate(held):
            if parts[index]:
                holders.setdefault(tuple((run.logical, run.num_items) for run in parts[index]), []).append(rank)
        _check_cover(spec, holders)
        for part, ranks in holders.items():
            if len(ranks) == 1:
                owned[ranks[0]][index] = held[ranks[0]][index]
            else:
                shared.setdefault(tuple(ranks), []).append((index, sum(count for _, count in part)))
    for sharers, tensors in shared.items():
        total_bytes = sum(count * specs[index].item_bytes for index, count in tensors)
        for position, rank in enumerate(sharers):
            begin, end = (total_bytes * share // len(sharers) for share in (position, position + 1))
            offset = 0
            for index, count in tensors:
                item = specs[index].item_bytes
                first, last = (_clamp((bound - offset) // item, count) for bound in (begin, end))
                if first < last:
                    owned[rank][index] = _cut(held[rank][index], first, last)
                offset += count * item
    return owned


def _clamp(value: int, limit: int) -> int:
    return min(max(value, 0), limit)


def _cut(runs: Sequence[Run], first: int, last: int) -> tuple[Run, ...]:
    """Elements `first` to `last` of runs that are taken as one after another."""
    found: list[Run] = []
    offset = 0
    for run in runs:
        begin, end = max(first, offset), min(last, offset + run.num_items)
        if begin < end:
            found.append(Run(run.logical + begin - offset, run.local + begin - offset, end - begin))
        offset += run.num_items
    return tuple(found)


def _check_cover(spec: TensorSpec, parts: Iterable[tuple[tuple[int, int], ...]]) -> None:
    intervals = sorted((start, start + count) for part in parts for start, count in part)
    position = 0
    for start, end in intervals:
        if start != position:
            what = "twice" if start < position else "by no rank"
            raise CheckpointError(
                f"{spec.name}: its elements from {min(start, position)} to {max(start, position)} are held {what}; "
                "this way of sharding is not understood"
            )
        position = end
    if position != spec.num_items:
        raise CheckpointError(
            f"{spec.name}: the ranks hold {position} of its {spec.num_items} elements; "
            "this way of sharding is not understood"
        )


def _stage(
    specs: Sequence[TensorSpec], layout: Layout, owned: Mapping[int, Sequence[Run]]
) -> tuple[list[Piece], list[FileRange], int]:
    """Lay out what a rank owns in its memory, in the order of the files, and join what is one piece there."""
    found: list[tuple[int, int, int, Run]] = []
    for index, runs in owned.items():
        file, begin = layout.places[specs[index].key]
        item = specs[index].item_bytes
        found.extend((file, begin + run.logical * item, index, run) for run in runs)
    found.sort()
    pieces: list[Piece] = []
    ranges: list[FileRange] = []
    end = position = 0
    while position < len(found):
        file, begin = found[position][:2]
        offset, members = begin, []
        while position < len(found) and found[position][:2] == (file, offset):
            _, _, index, run = found[position]
            members.append((index, run, offset - begin))
            offset += run.num_items * specs[index].item_bytes
            position += 1
        # In the memory as far into a page as in the file, so that the disk can take whole pages from it. A
        # small range is not worth the gap; but an element must lie where its type may lie.
        alignment = PAGE_BYTES if offset - begin >= MIN_DIRECT_BYTES else _ELEMENT_ALIGNMENT_BYTES
        staging = end + (begin - end) % alignment
        pieces += [Piece(index, run.local, run.num_items, staging + place) for index, run, place in members]
        ranges += _parts(FileRange(file, begin, staging, offset - begin))
        end = staging + offset - begin
    return pieces, ranges, end


def _parts(whole: FileRange) -> Iterable[FileRange]:
    """A range as ranges of at most `MAX_RANGE_BYTES`, cut where pages begin."""
    end = whole.offset + whole.size
    first_cut = whole.offset + MAX_RANGE_BYTES - whole.offset % MAX_RANGE_BYTES
    for start, stop in pairwise([whole.offset, *range(first_cut, end, MAX_RANGE_BYTES), end]):
        yield FileRange(whole.file, start, whole.staging + start - whole.offset, stop - start)
