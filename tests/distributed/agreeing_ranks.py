"""Ranks that do something together which fails on some of them, each in its own way."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from accelerate import Accelerator

from harness.agreement import Agreement
from harness.errors import CheckpointError, DamagedError
from tests.distributed.saving_ranks import become_rank

FAILURES = {
    "damage": DamagedError("a digest"),
    "disk": CheckpointError("a disk in trouble"),
    "memory": MemoryError("no more"),
}


def fail_together(rank: int, world_size: int, port: int, directory: Path, cases: list[list[str]]) -> None:
    """Each case names how each rank fails, or an empty text; leaves what was raised on this rank."""
    become_rank(rank, world_size, port)
    Accelerator(cpu=True)
    agreement = Agreement(rank, world_size, timeout_s=60)
    # Of each flag whether any rank has set it, however many ranks and flags there are.
    flags = [False] * 5 + [True] + [number == rank for number in range(world_size)] * 1000
    assert agreement.on_any("flags", flags) == [False] * 5 + [True] * (1 + 1000 * world_size)
    raised = []
    for case in cases:

        def run(how: str = case[rank]) -> int:
            if how:
                raise FAILURES[how]
            return rank

        try:
            assert agreement.together("doing it", run) == rank
            raised.append(["", ""])
        except CheckpointError as error:
            raised.append([type(error).__name__, str(error)])
    (directory / f"raised-{rank}").write_text(json.dumps(raised))
    dist.destroy_process_group()
