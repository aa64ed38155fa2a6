"""From what each rank holds to what each rank writes: every byte by exactly one rank.

    holdings of all ranks  ->  who shares what  ->  what this rank owns  ->  ranges of files, places in its memory

Every rank finds what it owns by itself, from the same exchange, and that all ranks together own each byte once;
rank zero is told the ranges of the others. With a thousand ranks there are millions: what the ranks exchange, and
what each looks at of the others, is by kinds of tensors, of which a model has a dozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import xxhash

from harness.checkpoint.format.all_ranges import AllRanges, FileRange, pack_ranges
from harness.checkpoint.format.layout import Layout, TensorSpec, plan_layout
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.save.direct_io import MIN_DIRECT_BYTES, PAGE_BYTES
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.checkpoint.sharding.replicas import check_replicas
from harness.checkpoint.sharding.shard_catalog import ShardCatalog, ShardKind, Sharing, kinds_of, sharing_of
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

# A digest is of at most so many bytes, so that a part of a large file can be verified by itself, and is
# written while the next is copied.
MAX_RANGE_BYTES = 16 << 20
# No type of safetensors has larger elements.
_ELEMENT_ALIGNMENT_BYTES = 16


class Piece(NamedTuple):
    """What a rank copies: elements of one tensor, to a place in its staging memory.

    `source` counts `LocalShards.tensors`; `local` and `num_items` are in elements, `staging` in bytes.
    """

    source: int
    local: int
    num_items: int
    staging: int


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Args:
        layout: files and places, the same on every rank.
        pieces: what this rank copies.
        staging_bytes: how much memory that takes.
        ranges: what it writes, in the order of its staging memory.
        all_ranges: what every rank writes; on rank zero alone.
    """

    layout: Layout
    pieces: tuple[Piece, ...]
    staging_bytes: int
    ranges: tuple[FileRange, ...]
    all_ranges: AllRanges | None = None


def make_plan(held: LocalShards, collectives: Collectives, max_shard_size_bytes: int | None) -> Plan:
    """Plan a checkpoint of what all ranks hold.

    Effects: collective; main thread; blocks until every rank has planned; nothing on disk.

    Args:
        held: what this rank holds.
        collectives: of all ranks.
        max_shard_size_bytes: limit of one file of weights, or None.

    Raises:
        CheckpointError: on all ranks alike, if they hold different tensors, if bytes are held by none, if
            ranks hold parts that overlap without being the same, or the same part with other values.
    """
    held.complete(collectives)
    specs = tuple(source.spec for source in held.tensors)
    mine = ShardCatalog.of(hash_of(specs, held.aliases), [source.ranges for source in held.tensors])
    holdings = [ShardCatalog.unpacked(part) for part in collectives.all_gather("what each rank holds", mine.packed())]
    plan, sharing = _plan(specs, held.aliases, holdings, collectives.rank, max_shard_size_bytes)
    told = collectives.gather_to_rank_zero("what each rank writes", pack_ranges(plan.staging_bytes, plan.ranges))
    check_replicas(held.tensors, sharing, collectives)
    return plan if told is None else with_all(plan, told)


def plan_of_rank_zero(held: LocalShards, collectives: Collectives, max_shard_size_bytes: int | None) -> Plan:
    """Plan a checkpoint of what rank zero holds, which is all of it; the others write nothing.

    Where ranks that hold the same tensors have other values in them, of which no mixture would be anybody's.

    Effects: collective; main thread; blocks until every rank has planned; nothing on disk.

    Args:
        held: what this rank holds.
        collectives: of all ranks.
        max_shard_size_bytes: limit of one file of weights, or None.
    """
    held.complete(collectives)
    specs = tuple(source.spec for source in held.tensors)
    layout = collectives.broadcast_from_rank_zero(
        "plan its files", lambda: plan_layout(specs, held.aliases, max_shard_size_bytes)
    )
    owned = {index: source.ranges for index, source in enumerate(held.tensors)} if collectives.rank == 0 else {}
    pieces, ranges, size = _stage(specs, layout, owned)
    plan = Plan(layout, tuple(pieces), size, tuple(ranges))
    told = collectives.gather_to_rank_zero("what each rank writes", pack_ranges(size, ranges))
    return plan if told is None else with_all(plan, told)


def plan_of(
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    holdings: Sequence[ShardCatalog],
    rank: int,
    max_shard_size_bytes: int | None,
) -> Plan:
    """The plan for one rank, given what all of them hold. Not collective; see `make_plan`."""
    return _plan(specs, aliases, holdings, rank, max_shard_size_bytes)[0]


def with_all(plan: Plan, told: Sequence[bytes]) -> Plan:
    """Rank zero's plan, with what every rank has told of its own."""
    return Plan(plan.layout, plan.pieces, plan.staging_bytes, plan.ranges, AllRanges(plan.layout, told))


def _plan(
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    holdings: Sequence[ShardCatalog],
    rank: int,
    max_shard_size_bytes: int | None,
) -> tuple[Plan, Sharing]:
    for other, part in enumerate(holdings):
        if part.structure != holdings[0].structure:
            raise CheckpointError(
                f"rank {other} has other tensors than rank 0, so their parts do not make one checkpoint; the model "
                "and the optimizer must be made alike on all ranks"
            )
    layout = plan_layout(specs, aliases, max_shard_size_bytes)
    kinds = kinds_of(specs, holdings)
    sharing = sharing_of(kinds)
    pieces, ranges, size = _stage(specs, layout, assign(specs, holdings[rank], kinds, sharing, rank))
    return Plan(layout, tuple(pieces), size, tuple(ranges)), sharing


def hash_of(specs: Iterable[TensorSpec], aliases: Mapping[str, str]) -> int:
    """A number that differs where tensors or aliases do; the same in every process."""
    digest = xxhash.xxh3_64()
    for spec in specs:
        digest.update(f"{spec.section}\0{spec.name}\0{spec.dtype}\0{spec.shape}\1".encode())
    for alias, first in aliases.items():
        digest.update(f"{alias}\0{first}\1".encode())
    return digest.intdigest() >> 1  # so that it fits a signed number


def assign(
    specs: Sequence[TensorSpec], mine: ShardCatalog, kinds: Sequence[ShardKind], sharing: Sharing, rank: int
) -> dict[int, tuple[ElementRange, ...]]:
    """What this rank owns: each element is one rank's among those that hold it.

    Ranks that hold the same parts of the same tensors (DDP's, HSDP's replicas) divide the bytes of those
    tensors among them, evenly, as one stream: nobody copies or writes what another does.

    Args:
        specs: of the tensors.
        mine: what this rank holds.
        kinds: of all tensors.
        sharing: which ranks hold the same.
        rank: this rank.

    Returns:
        Index of the tensor -> what it owns.
    """
    owned: dict[int, tuple[ElementRange, ...]] = {}
    for kind in kinds:
        if any(ranks == (rank,) for ranks in kind.parts.values()):
            owned |= {index: mine.ranges_of(index) for index in kind.tensors}
    for sharers, tensors in sharing.items():
        if rank not in sharers:
            continue
        counts = [sum(run.num_items for run in mine.ranges_of(index)) for index in tensors]
        total_bytes = sum(count * specs[index].item_bytes for index, count in zip(tensors, counts, strict=True))
        position = sharers.index(rank)
        begin, end = (total_bytes * share // len(sharers) for share in (position, position + 1))
        offset = 0
        for index, count in zip(tensors, counts, strict=True):
            item = specs[index].item_bytes
            first, last = (_clamp((bound - offset) // item, count) for bound in (begin, end))
            if first < last:
                owned[index] = _cut(mine.ranges_of(index), first, last)
            offset += count * item
    return owned


def _clamp(value: int, limit: int) -> int:
    return min(max(value, 0), limit)


def _cut(runs: Sequence[ElementRange], first: int, last: int) -> tuple[ElementRange, ...]:
    """Elements `first` to `last` of runs that are taken as one after another."""
    found: list[ElementRange] = []
    offset = 0
    for run in runs:
        begin, end = max(first, offset), min(last, offset + run.num_items)
        if begin < end:
            found.append(ElementRange(run.logical + begin - offset, run.local + begin - offset, end - begin))
        offset += run.num_items
    return tuple(found)


def _stage(
    specs: Sequence[TensorSpec], layout: Layout, owned: Mapping[int, Sequence[ElementRange]]
) -> tuple[list[Piece], list[FileRange], int]:
    """Lay out what a rank owns in its memory, in the order of the files, and join what is one piece there."""
    found: list[tuple[int, int, int, ElementRange]] = []
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
