from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harness.checkpoint.format.all_ranges import FileRange
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import DTYPES, ElementRange
from harness.checkpoint.save.plan import MAX_RANGE_BYTES, Plan, hash_of, plan_of
from harness.checkpoint.save.writer import MIN_DIRECT_BYTES, PAGE_BYTES
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.errors import CheckpointError


class Part(NamedTuple):
    """A rank's memory of one tensor: element indices of the logical tensor, -1 where there is padding."""

    indices: list[int]

    @property
    def runs(self) -> tuple[ElementRange, ...]:
        found: list[ElementRange] = []
        for local, logical in enumerate(self.indices):
            last = found[-1] if found else None
            if logical < 0:
                continue
            if last and (last.logical + last.num_items, last.local + last.num_items) == (logical, local):
                found[-1] = last._replace(num_items=last.num_items + 1)
            else:
                found.append(ElementRange(logical, local, 1))
        return tuple(found)


Parts = list[Part]


def replicated(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    return [Part(list(range(math.prod(shape))))] * world


def rank_zeros(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    return [Part(list(range(math.prod(shape)))), *[Part([])] * (world - 1)]


def rows(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    """As FSDP2 divides: by ceil(rows / ranks), the last ranks may have none; padded to the same length."""
    if not shape:
        return replicated(shape, world, draw)
    inner, count = math.prod(shape[1:]), -(-shape[0] // world)
    cuts = [min(rank * count, shape[0]) * inner for rank in range(world + 1)]
    return [Part([*range(a, b), *[-1] * (count * inner - (b - a))]) for a, b in pairwise(cuts)]


def columns(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    """As tensor parallelism divides: many short runs."""
    if not shape:
        return rank_zeros(shape, world, draw)
    indices = torch.arange(math.prod(shape)).reshape(shape).movedim(-1, 0)
    chunks: list[list[int]] = [chunk.movedim(0, -1).flatten().tolist() for chunk in indices.chunk(world)]
    return [Part(chunk) for chunk in chunks] + [Part([])] * (world - len(chunks))


def flat_cuts(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    """As DeepSpeed divides: anywhere, with padding before."""
    size = math.prod(shape)
    cuts = sorted(draw(st.lists(st.integers(0, size), min_size=world - 1, max_size=world - 1)))
    padding = draw(st.integers(0, 3))
    return [Part([*[-1] * padding, *range(a, b)]) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


def two_replicas(shape: tuple[int, ...], world: int, draw: Any) -> Parts:
    """As HSDP does: each shard on two ranks; an odd rank holds nothing."""
    if world == 1:
        return replicated(shape, world, draw)
    shards = flat_cuts(shape, world // 2, draw)
    return [*shards, *shards, *[Part([])] * (world % 2)]


class Case(NamedTuple):
    specs: list[TensorSpec]
    tensors: list[Tensor]
    parts: list[Parts]
    world: int

    def holdings(self) -> list[ShardCatalog]:
        return [ShardCatalog.of(7, [parts[rank].runs for parts in self.parts]) for rank in range(self.world)]


@st.composite
def cases(draw: Callable[..., Any], ways: Sequence[Callable[..., Parts]]) -> Case:
    world = draw(st.integers(1, 5))
    specs, tensors, parts = [], [], []
    for number in range(draw(st.integers(0, 6))):
        section = draw(st.sampled_from(["model", "optimizer"]))
        shape = tuple(draw(st.lists(st.integers(0, 7), max_size=3)))
        spec = TensorSpec(section, f"t{number}", draw(st.sampled_from(sorted(DTYPES))), shape)
        top = 2 if spec.dtype == "BOOL" else 256
        data = torch.randint(0, top, (spec.size_bytes,), generator=torch.Generator().manual_seed(number))
        specs.append(spec)
        tensors.append(data.to(torch.uint8).view(DTYPES[spec.dtype]).reshape(shape))
        parts.append(draw(st.sampled_from(ways))(shape, world, draw))
    return Case(specs, tensors, parts, world)


def data_of(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def staged(case: Case, plan: Plan, rank: int) -> bytes:
    """What the rank's staging memory holds once its pieces are copied."""
    memory = bytearray(plan.staging_bytes)
    for piece in plan.pieces:
        item = case.specs[piece.source].item_bytes
        assert piece.staging % item == 0
        assert piece.staging + piece.num_items * item <= len(memory)
        data = data_of(case.tensors[piece.source])
        indices = case.parts[piece.source][rank].indices[piece.local : piece.local + piece.num_items]
        assert len(indices) == piece.num_items
        assert min(indices) >= 0  # no padding
        for position, index in enumerate(indices):
            at = piece.staging + position * item
            memory[at : at + item] = data[index * item : (index + 1) * item]
    return bytes(memory)


ALL_WAYS = [replicated, rank_zeros, rows, columns, flat_cuts, two_replicas]


@given(cases(ALL_WAYS), st.one_of(st.none(), st.integers(1, 200)))
def test_files_are_as_safetensors_writes_them_when_all_ranks_have_written(case: Case, limit: int | None) -> None:
    plans = [plan_of(case.specs, {}, case.holdings(), rank, limit) for rank in range(case.world)]
    layout = plans[0].layout
    files = [bytearray(file.header + b"\xaa" * (file.size_bytes - len(file.header))) for file in layout.files]
    covered: list[list[tuple[int, int]]] = [[(0, len(file.header))] for file in layout.files]
    for rank, plan in enumerate(plans):
        assert plan.layout == layout
        memory = staged(case, plan, rank)
        ends = 0
        for file, offset, staging, size in plan.ranges:
            assert size > 0
            assert ends <= staging <= staging + size <= len(memory)  # in the order of the memory
            ends = staging + size
            covered[file].append((offset, offset + size))
            files[file][offset : offset + size] = memory[staging : staging + size]
    for file, intervals in zip(layout.files, covered, strict=True):
        position = 0
        for begin, end in sorted(intervals):
            assert begin == position  # neither a gap nor written twice
            position = end
        assert position == file.size_bytes
    by_key = {spec.key: tensor for spec, tensor in zip(case.specs, case.tensors, strict=True)}
    for file, content in zip(layout.files, files, strict=True):
        tensors = {spec.name: by_key[spec.key] for spec in file.tensors}
        expected = safetensors.torch.save(tensors, {"format": "pt"})
        assert content[len(file.header) :] == expected[8 + int.from_bytes(expected[:8], "little") :]
        loaded = {
            name: (one["dtype"], one["shape"], one["data"]) for name, one in safetensors.deserialize(bytes(content))
        }
        assert loaded == {spec.name: (spec.dtype, list(spec.shape), data_of(by_key[spec.key])) for spec in file.tensors}


def written_bytes(case: Case) -> list[int]:
    plans = [plan_of(case.specs, {}, case.holdings(), rank, None) for rank in range(case.world)]
    return [sum(part.size for part in plan.ranges) for plan in plans]


@given(cases([replicated]))
def test_bytes_are_divided_evenly_when_all_ranks_hold_everything(case: Case) -> None:
    total = sum(spec.size_bytes for spec in case.specs)
    written = written_bytes(case)
    assert sum(written) == total
    assert max(written) <= -(-total // case.world) + 8


@given(cases([two_replicas]))
def test_each_replica_writes_its_share_when_there_are_two(case: Case) -> None:
    written = written_bytes(case)
    num_shards = case.world // 2
    for shard in range(num_shards):
        held = sum(
            run.num_items * spec.item_bytes
            for spec, parts in zip(case.specs, case.parts, strict=True)
            for run in parts[shard].runs
        )
        assert written[shard] + written[shard + num_shards] == held
        assert max(written[shard], written[shard + num_shards]) <= -(-held // 2) + 8


@given(cases(ALL_WAYS))
def test_holdings_are_the_same_when_packed_and_unpacked(case: Case) -> None:
    for holdings in case.holdings():
        found = ShardCatalog.unpacked(holdings.packed())
        assert (found.structure, found.patterns) == (holdings.structure, holdings.patterns)
        assert found.which.tolist() == holdings.which.tolist()


def test_ranges_are_cut_when_they_are_long() -> None:
    size = 2 * MAX_RANGE_BYTES + 5
    specs = [TensorSpec("model", "a", "U8", (size,))]
    plan = plan_of(specs, {}, [ShardCatalog.of(0, [(ElementRange(0, 0, size),)])], 0, None)
    begin = len(plan.layout.files[0].header)
    # Where pages of the file begin; and the memory is as far into a page as the file.
    cuts = [begin, MAX_RANGE_BYTES, 2 * MAX_RANGE_BYTES, begin + size]
    expected = [FileRange(0, start, start, stop - start) for start, stop in pairwise(cuts)]
    assert plan.ranges == tuple(expected)


@given(st.data())
def test_memory_and_file_agree_on_where_pages_begin_when_a_range_is_large(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 3 * MIN_DIRECT_BYTES), min_size=1, max_size=6))
    owned = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    specs = [TensorSpec("model", f"t{number}", "U8", (size,)) for number, size in enumerate(sizes)]
    mine, other = (
        [(ElementRange(0, 0, size),) if size and held else () for size, held in zip(sizes, flags, strict=True)]
        for flags in (owned, [not held for held in owned])
    )
    plan = plan_of(specs, {}, [ShardCatalog.of(0, mine), ShardCatalog.of(0, other)], 0, None)
    for part in plan.ranges:
        if part.size >= MIN_DIRECT_BYTES:
            assert (part.staging - part.offset) % PAGE_BYTES == 0
    num_bytes = sum(part.size for part in plan.ranges)
    num_large = sum(part.size >= MIN_DIRECT_BYTES for part in plan.ranges)
    assert plan.staging_bytes <= num_bytes + PAGE_BYTES * num_large + 16 * len(specs)


def test_neighbours_are_one_range_when_they_lie_together() -> None:
    specs = [TensorSpec("model", f"t{number}", "F32", (3,)) for number in range(100)]
    plan = plan_of(specs, {}, [ShardCatalog.of(0, [(ElementRange(0, 0, 3),)] * 100)], 0, None)
    assert [(part.staging, part.size) for part in plan.ranges] == [(0, 1200)]
    assert len(plan.pieces) == 100


SPEC = TensorSpec("model", "fc.weight", "F32", (10,))


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([[(0, 4)], [(5, 5)]], "fc.weight: its elements from 4 to 5 are held by no rank"),
        ([[(1, 9)], []], "fc.weight: its elements from 0 to 1 are held by no rank"),
        ([[(0, 4)], [(4, 5)]], "fc.weight: the ranks hold 9 of its 10 elements"),
        ([[], []], "fc.weight: the ranks hold 0 of its 10 elements"),
        ([[(0, 6)], [(5, 5)]], "fc.weight: its elements from 5 to 6 are held twice"),
        ([[(0, 10)], [(0, 5)]], "are held twice"),
        ([[(0, 5), (5, 5)], [(0, 10)]], "are held twice"),
        ([[(0, 10)], [(5, 10)]], "are held twice"),
        ([[(0, 11)], []], "the ranks hold 11 of its 10 elements"),
    ],
)
def test_error_names_the_tensor_when_parts_do_not_fit(held: list[list[tuple[int, int]]], expected: str) -> None:
    holdings = [ShardCatalog.of(0, [tuple(ElementRange(start, 0, count) for start, count in runs)]) for runs in held]
    for rank in range(2):  # on every rank alike
        with pytest.raises(CheckpointError) as caught:
            plan_of([SPEC], {}, holdings, rank, None)
        assert expected in str(caught.value)


def test_error_names_the_rank_when_it_has_other_tensors() -> None:
    runs = [(ElementRange(0, 0, 10),)]
    with pytest.raises(CheckpointError, match="rank 2 has other tensors than rank 0"):
        plan_of([SPEC], {}, [ShardCatalog.of(1, runs), ShardCatalog.of(1, runs), ShardCatalog.of(2, runs)], 0, None)


def test_hash_differs_when_anything_of_the_structure_does() -> None:
    structures: list[tuple[list[TensorSpec], dict[str, str]]] = [
        ([], {}),
        ([SPEC], {}),
        ([SPEC, SPEC], {}),
        ([SPEC], {"a": "b"}),
        ([SPEC], {"b": "a"}),
        ([TensorSpec("optimizer", "fc.weight", "F32", (10,))], {}),
        ([TensorSpec("model", "fc.bias", "F32", (10,))], {}),
        ([TensorSpec("model", "fc.weight", "I32", (10,))], {}),
        ([TensorSpec("model", "fc.weight", "F32", (10, 1))], {}),
    ]
    hashes = [hash_of(*structure) for structure in structures]
    assert len(set(hashes)) == len(hashes)
    assert hashes == [hash_of(*structure) for structure in structures]
    assert all(0 <= value < 1 << 63 for value in hashes)
