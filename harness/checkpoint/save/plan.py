"""Which rank writes which bytes: every byte of a checkpoint is written by exactly one rank.

    shard catalogs of all ranks  ->  which ranks share what  ->  what this rank owns  ->  file ranges, staging offsets

Every rank derives from the same exchange what it owns, and that all ranks together own each byte once. Rank 0 also
receives the ranges of the others. A thousand ranks have millions of ranges; what the ranks exchange, and what each
examines of the others, is by kinds of tensors, of which a model has a dozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import xxhash

from harness.checkpoint.format.all_ranges import AllRanges, FileRange, pack_ranges
from harness.checkpoint.format.layout import Layout, TensorSpec, plan_layout
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.save.writer import MIN_DIRECT_BYTES, PAGE_BYTES
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.checkpoint.sharding.replicas import check_replicas
from harness.checkpoint.sharding.shard_catalog import ShardCatalog, ShardKind, Sharing, kinds_of, sharing_of
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

# Limit of the bytes of one digest. So a part of a large file can be verified by itself, and is written while the next
# part is copied.
MAX_RANGE_BYTES = 16 << 20
# No dtype of safetensors has larger elements.
_ELEMENT_ALIGNMENT_BYTES = 16


class Piece(NamedTuple):
    """Elements of one tensor that a rank copies to its staging memory.

    `source` is an index of `LocalShards.tensors`; `local` and `num_items` are in elements, `staging` is in bytes.
    """

    source: int
    local: int
    num_items: int
    staging: int


@dataclass(frozen=True)
class Plan:
    """What one rank writes.

    Args:
        layout: files and offsets, the same on every rank.
        pieces: what this rank copies.
        staging_bytes: size of its staging memory.
        ranges: what it writes, in the order of its staging memory.
        all_ranges: what every rank writes; only on rank 0.
    """

    layout: Layout
    pieces: tuple[Piece, ...]
    staging_bytes: int
    ranges: tuple[FileRange, ...]
    all_ranges: AllRanges | None = None


def make_plan(shards: LocalShards, collectives: Collectives, max_shard_size_bytes: int | None) -> Plan:
    """Plan a checkpoint of what all ranks hold.

    Effects: collective; main thread; blocks until every rank has planned; nothing on disk.

    Args:
        shards: what this rank holds.
        collectives: of all ranks.
        max_shard_size_bytes: limit of one file of weights; None: no limit.

    Raises:
        CheckpointError: on all ranks, if they hold different tensors, if bytes are held by no rank, or if ranks hold
            parts that overlap without being equal, or equal parts with different values.
    """
    shards.complete(collectives)
    specs = tuple(source.spec for source in shards.tensors)
    own = ShardCatalog.of(hash_of(specs, shards.aliases), [source.ranges for source in shards.tensors])
    catalogs = [ShardCatalog.unpacked(part) for part in collectives.all_gather("what each rank holds", own.packed())]
    plan, sharing = _plan(specs, shards.aliases, catalogs, collectives.rank, max_shard_size_bytes)
    gathered = collectives.gather_to_rank_zero("what each rank writes", pack_ranges(plan.staging_bytes, plan.ranges))
    check_replicas(shards.tensors, sharing, collectives)
    return plan if gathered is None else with_all_ranges(plan, gathered)


def make_rank_zero_plan(shards: LocalShards, collectives: Collectives, max_shard_size_bytes: int | None) -> Plan:
    """Plan a checkpoint of rank 0's values; the other ranks write nothing.

    For replicas whose values differ: a mixture of them would be the state of no rank.

    Effects: collective; main thread; blocks until every rank has planned; nothing on disk.

    Args: as `make_plan`.
    """
    shards.complete(collectives)
    specs = tuple(source.spec for source in shards.tensors)
    layout = collectives.broadcast_from_rank_zero(
        "plan its files", lambda: plan_layout(specs, shards.aliases, max_shard_size_bytes)
    )
    owned = {index: source.ranges for index, source in enumerate(shards.tensors)} if collectives.rank == 0 else {}
    pieces, ranges, size_bytes = _stage(specs, layout, owned)
    plan = Plan(layout, tuple(pieces), size_bytes, tuple(ranges))
    gathered = collectives.gather_to_rank_zero("what each rank writes", pack_ranges(size_bytes, ranges))
    return plan if gathered is None else with_all_ranges(plan, gathered)


def plan_of(
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    catalogs: Sequence[ShardCatalog],
    rank: int,
    max_shard_size_bytes: int | None,
) -> Plan:
    """Plan for one rank, given the catalogs of all ranks. Not collective; raises as `make_plan`."""
    return _plan(specs, aliases, catalogs, rank, max_shard_size_bytes)[0]


def with_all_ranges(plan: Plan, packed_ranges: Sequence[bytes]) -> Plan:
    """Return rank 0's plan with the ranges of every rank."""
    return replace(plan, all_ranges=AllRanges(plan.layout, packed_ranges))


def _plan(
    specs: Sequence[TensorSpec],
    aliases: Mapping[str, str],
    catalogs: Sequence[ShardCatalog],
    rank: int,
    max_shard_size_bytes: int | None,
) -> tuple[Plan, Sharing]:
    for other, part in enumerate(catalogs):
        if part.structure != catalogs[0].structure:
            raise CheckpointError(
                f"rank {other} has other tensors than rank 0, so their parts do not form one checkpoint; create the "
                "model and the optimizer alike on all ranks"
            )
    layout = plan_layout(specs, aliases, max_shard_size_bytes)
    kinds = kinds_of(specs, catalogs)
    sharing = sharing_of(kinds)
    pieces, ranges, size = _stage(specs, layout, assign(specs, catalogs[rank], kinds, sharing, rank))
    return Plan(layout, tuple(pieces), size, tuple(ranges)), sharing


def hash_of(specs: Iterable[TensorSpec], aliases: Mapping[str, str]) -> int:
    """Return a hash of the tensors and aliases, the same in every process."""
    digest = xxhash.xxh3_64()
    for spec in specs:
        digest.update(f"{spec.section}\0{spec.name}\0{spec.dtype}\0{spec.shape}\1".encode())
    for alias, first in aliases.items():
        digest.update(f"{alias}\0{first}\1".encode())
    return digest.intdigest() >> 1  # so that it fits a signed number


def assign(
    specs: Sequence[TensorSpec], mine: ShardCatalog, kinds: Sequence[ShardKind], sharing: Sharing, rank: int
) -> dict[int, tuple[ElementRange, ...]]:
    """Assign each element to one of the ranks that hold it.

    Ranks that hold the same parts of the same tensors (replicas of DDP and HSDP) divide the bytes of those tensors
    evenly among them, as one stream, so that no byte is copied or written twice.

    Args:
        specs: of the tensors.
        mine: what this rank holds.
        kinds: of all tensors.
        sharing: ranks -> the tensors of which they hold equal parts.
        rank: this rank.

    Returns:
        Index of the tensor -> what this rank owns of it.
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
    """Return the elements `first` to `last` of the concatenated runs."""
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
    """Lay out what a rank owns in its staging memory, in the order of the files, and join adjacent parts."""
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
        # At the same offset in a page as in the file, so that the disk can read whole pages. A small range is not
        # worth the gap, but its elements have to be aligned for their dtype.
        alignment = PAGE_BYTES if offset - begin >= MIN_DIRECT_BYTES else _ELEMENT_ALIGNMENT_BYTES
        staging = end + (begin - end) % alignment
        pieces += [Piece(index, run.local, run.num_items, staging + place) for index, run, place in members]
        ranges += _parts(FileRange(file, begin, staging, offset - begin))
        end = staging + offset - begin
    return pieces, ranges, end


def _parts(whole: FileRange) -> Iterable[FileRange]:
    """Divide a range into ranges of at most `MAX_RANGE_BYTES`, at page boundaries."""
    end = whole.offset + whole.size
    first_cut = whole.offset + MAX_RANGE_BYTES - whole.offset % MAX_RANGE_BYTES
    for start, stop in pairwise([whole.offset, *range(first_cut, end, MAX_RANGE_BYTES), end]):
        yield FileRange(whole.file, start, whole.staging + start - whole.offset, stop - start)
