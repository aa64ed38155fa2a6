"""Ranks on nodes of their own, as far as their launcher's variables say; rank zero writes down what is logged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from harness.distributed.collectives import Collectives
from harness.metrics.system.sampler import INTERVAL_VARIABLE, start_sampler
from tests.distributed.saving_ranks import become_rank


class Sink:
    """Keeps what is logged and warned of."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, Any]] = []
        self.warnings: list[str] = []

    def log_system_metrics(self, values: Mapping[str, float]) -> None:
        self.logged.append(values)

    def warn(self, line: str) -> None:
        self.warnings.append(line)


def sample(rank: int, world_size: int, port: int, directory: Path, nodes: list[int], alive_s: list[float]) -> None:
    """Each rank is on the node that `nodes` says, and samples for as long as `alive_s` says."""
    become_rank(rank, world_size, port)
    os.environ.update({"GROUP_RANK": str(nodes[rank]), INTERVAL_VARIABLE: "0.5"})
    Accelerator(cpu=True)
    sink = Sink()
    sampler = start_sampler(Collectives(rank, world_size, timeout_s=60), torch.device("cpu"), sink)
    time.sleep(alive_s[rank])  # the training's own work
    if sampler is not None:
        sampler.stop()
    (directory / f"sampled-{rank}.json").write_text(
        json.dumps({"samples": sampler is not None, "logged": sink.logged, "warnings": sink.warnings})
    )
    dist.barrier()
    dist.destroy_process_group()
