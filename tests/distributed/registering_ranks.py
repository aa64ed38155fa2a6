"""One rank of a loop that registers a state of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.errors import HarnessError
from tests.distributed.saving_ranks import become_rank


class Count:
    def __init__(self, first: int) -> None:
        self.values = torch.full((4,), first)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def run_loop(rank: int, world_size: int, port: int, directory: Path, is_alike: bool, is_lenient: bool) -> None:
    """One epoch of two steps, started by `multiprocessing`; what is said is in `directory`/said-<rank>."""
    become_rank(rank, world_size, port)
    with (directory / f"said-{rank}").open("w", buffering=1) as sys.stderr:
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(3, 1)
        model, optimizer, loader = accelerator.prepare(
            model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(torch.ones(8, 3), batch_size=2)
        )
        try:
            with PeriodicLogger(
                accelerator,
                1,
                run_name="run",
                run_dir=directory,
                checkpoint=CheckpointConfig(when_busy="wait"),
                tracking=TrackingConfig(enabled=False),
            ) as logger:
                logger.watch(model, optimizer)
                logger.register("count", Count(0 if is_alike else rank), is_lenient=is_lenient)
                for _ in logger.epochs(1):
                    for batch in logger.batches(loader):
                        accelerator.backward(model(batch).mean())
                        optimizer.step()
                        optimizer.zero_grad()
        except HarnessError as error:
            print(error, file=sys.stderr)
            sys.exit(1)
