"""Ranks that run work which fails on some of them, and broadcast unusual tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from harness.distributed.broadcast import broadcast_buffers
from harness.distributed.collectives import Collectives
from harness.distributed.model_preparation import check_ddp_tensors
from harness.errors import CheckpointError, ConfigError, DamagedError
from tests.distributed.saving_ranks import become_rank

FAILURES = {
    "damage": DamagedError("a digest"),
    "disk": CheckpointError("a disk in trouble"),
    "memory": MemoryError("no more"),
}


BUFFERS: dict[str, Callable[[float], Tensor]] = {
    "complex128": lambda value: torch.full((2, 3), value, dtype=torch.complex128),
    "conjugated": lambda value: torch.full((3,), complex(value, value)).conj(),
    "16-bit integers": lambda value: torch.full((3,), int(value), dtype=torch.int16),
    "unsigned": lambda value: torch.full((3,), int(value), dtype=torch.uint16),
    "8-bit floats": lambda value: torch.full((3,), value).to(torch.float8_e4m3fn),
    "transposed": lambda value: (torch.arange(6.0) * value).reshape(2, 3).t(),
    "every second": lambda value: torch.full((6,), value)[::2],
    "one of many": lambda value: torch.full((12,), value)[::11][1:],
    "expanded": lambda value: torch.full((1,), value).expand(4),
    "no dimension": lambda value: torch.tensor(value),
    "empty": lambda value: torch.empty(0, 4),
}


def check_broadcast(rank: int, world_size: int) -> None:
    """Buffers of many types and layouts, different on each rank, become those of rank 0."""
    model = nn.Module()
    for name, make in BUFFERS.items():
        model.register_buffer(name, make(rank + 1.0))
    around = torch.full((6,), rank + 1.0)
    model.register_buffer("part", around[::2])
    broadcast_buffers(model, world_size)
    for name, make in BUFFERS.items():
        assert torch.equal(model.get_buffer(name), make(1.0)), name
    # Memory between the elements of a strided buffer does not change.
    assert around.tolist() == [1.0, rank + 1.0] * 3


def refused_by_ddp() -> dict[str, str]:
    """The errors of `check_ddp_tensors` for models with one unusual buffer."""
    errors = {}
    for name, make in BUFFERS.items():
        model = nn.Linear(2, 2)
        model.register_buffer("unusual", make(1.0))
        try:
            check_ddp_tensors(Accelerator(cpu=True), model)
        except ConfigError as error:
            errors[name] = str(error)
        else:
            nn.parallel.DistributedDataParallel(model)
    return errors


def run_cases(rank: int, world_size: int, port: int, directory: Path, cases: list[list[str]]) -> None:
    """Each case names the failure of each rank, or an empty text; writes what this rank raised."""
    become_rank(rank, world_size, port)
    Accelerator(cpu=True)
    collectives = Collectives(rank, world_size, timeout_s=60)
    # Each flag is set if any rank sets it.
    flags = [False] * 5 + [True] + [number == rank for number in range(world_size)] * 1000
    assert collectives.all_reduce_any("flags", flags) == [False] * 5 + [True] * (1 + 1000 * world_size)
    raised = []
    for case in cases:

        def run(how: str = case[rank]) -> int:
            if how:
                raise FAILURES[how]
            return rank

        try:
            assert collectives.run_on_all_ranks("doing it", run) == rank
            raised.append(["", ""])
        except CheckpointError as error:
            raised.append([type(error).__name__, str(error)])
    (directory / f"raised-{rank}").write_text(json.dumps(raised))
    check_broadcast(rank, world_size)
    (directory / f"refused-{rank}").write_text(json.dumps(refused_by_ddp()))
    dist.destroy_process_group()
