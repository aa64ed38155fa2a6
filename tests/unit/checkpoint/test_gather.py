from __future__ import annotations

import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint.format.all_ranges import pack_ranges
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.tensor_shard import ElementRange
from harness.checkpoint.save.gather import CHUNK_BYTES, Gatherer
from harness.checkpoint.save.plan import Plan, plan_of, with_all
from harness.checkpoint.save.write import output_files
from harness.checkpoint.save.writer import make_files
from harness.checkpoint.sharding.shard_catalog import ShardCatalog
from harness.errors import CheckpointError


@pytest.fixture
def groups() -> Iterator[list[dist.ProcessGroup]]:
    """Two real gloo endpoints in two threads."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(dist.ProcessGroupGloo, store, rank, 2, timedelta(seconds=30))  # type: ignore[attr-defined]
            for rank in range(2)
        ]
        yield [group.result(timeout=60) for group in made]


def plans_for(sizes: list[int]) -> tuple[Plan, Plan]:
    """Rank zero's and rank one's, of tensors of bytes: even ones are on rank zero, odd ones on rank one."""
    specs = [TensorSpec("model", f"t{number:03}", "U8", (size,)) for number, size in enumerate(sizes)]
    holdings = [
        ShardCatalog.of(
            0, [(ElementRange(0, 0, size),) if number % 2 == rank else () for number, size in enumerate(sizes)]
        )
        for rank in range(2)
    ]
    first, second = (plan_of(specs, {}, holdings, rank, None) for rank in range(2))
    return with_all(first, [pack_ranges(plan.staging_bytes, plan.ranges) for plan in (first, second)]), second


def memory_for(plan: Plan) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (plan.staging_bytes,), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize(
    "sizes",
    [
        [3, 5],
        [3, 0],  # rank one has nothing
        [7, 100, 1, 200, 3, 300],
        [5, CHUNK_BYTES],
        [5, CHUNK_BYTES - 3, 6, 2 * CHUNK_BYTES, 1, 11],  # chunks end inside ranges
    ],
)
def test_ranges_are_where_they_belong_when_received(
    tmp_path: Path, groups: list[dist.ProcessGroup], sizes: list[int]
) -> None:
    plan, sender = plans_for(sizes)
    memory = memory_for(sender)
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(Gatherer(groups[1], 1, 30.0).send, memory, sender.staging_bytes)
        Gatherer(groups[0], 0, 30.0).receive(plan, tmp_path)
        sending.result(timeout=30)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert len(content) == plan.layout.size_bytes
    expected = bytearray(plan.layout.files[0].header.ljust(len(content), b"\0"))
    for _, offset, staging, size in sender.ranges:
        expected[offset : offset + size] = memory[staging : staging + size].numpy().tobytes()
    assert content == expected  # and nothing where rank zero's writer writes


def test_sender_is_let_go_when_the_disk_of_rank_zero_is_full(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    plan, sender = plans_for([1, 4 * CHUNK_BYTES])
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(Gatherer(groups[1], 1, 30.0).send, memory_for(sender), sender.staging_bytes)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (CHUNK_BYTES // 2, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                Gatherer(groups[0], 0, 30.0).receive(plan, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sending.result(timeout=30)


def test_error_names_the_rank_when_it_does_not_send(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    plan, _ = plans_for([1, 10])
    make_files(tmp_path, output_files(plan.layout, with_headers=True))
    with pytest.raises(CheckpointError, match="waited for rank 1 to send its part of the checkpoint"):
        Gatherer(groups[0], 0, 0.1).receive(plan, tmp_path)


def test_error_names_rank_zero_when_it_does_not_take(groups: list[dist.ProcessGroup]) -> None:
    with pytest.raises(CheckpointError, match="waited for rank 0 to take a part of the checkpoint"):
        Gatherer(groups[1], 1, 0.1).send(torch.zeros(10, dtype=torch.uint8), 10)
