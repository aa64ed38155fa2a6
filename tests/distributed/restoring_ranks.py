"""Ranks that save under one strategy, and ranks that restore under another what those have saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from harness.agreement import Agreement
from harness.checkpoint.restore import materialize, restore_tensors
from harness.checkpoint.saver import Saver
from harness.checkpoint.shards.held import find_held
from harness.checkpoint.trainer_state import Moment, Watched
from harness.config import CheckpointConfig
from tests.distributed.saving_ranks import become_rank, ignore


class Net(nn.Module):
    """Uneven shapes, tied and frozen weights, a buffer."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.first = nn.Linear(5, 11)
        self.second = nn.Linear(11, 5, bias=False)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.frozen(self.second(torch.relu(self.first(self.embed(x)))))))
        return out


def made(strategy: str, world_size: int, seed: int) -> Watched:
    """Not prepared by accelerate: DDP's ranks do the same, with the same data."""
    torch.manual_seed(seed)
    model = Net()
    if strategy != "replicated":
        sizes, names = (
            ((2, world_size // 2), ("replica", "shard")) if strategy == "hsdp" else ((world_size,), ("shard",))
        )
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return Watched(model, torch.optim.AdamW(model.parameters(), lr=0.1), None)


def save_under(rank: int, world_size: int, port: int, directory: Path, strategy: str) -> None:
    """Three steps and a save."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    watched = made(strategy, world_size, seed=world_size)
    checkpoints = directory / f"{strategy}-{world_size}"
    checkpoints.mkdir(exist_ok=True)
    saver = Saver(accelerator, Agreement(rank, world_size), CheckpointConfig(), checkpoints, {}, {}, ignore)
    saver.check(watched)
    optimizer: Any = watched.optimizer
    for step in range(1, 4):
        watched.model(torch.arange(7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        watched.model.steps.fill_(step)  # type: ignore[operator, union-attr]
    saver.save(Moment("step-3", 0, 3, 0, {}))
    saver.close()


def restore_under(rank: int, world_size: int, port: int, directory: Path, strategy: str, names: list[str]) -> None:
    """Restore each of the checkpoints in turn, and write what all ranks then hold together."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    agreement = Agreement(rank, world_size)
    watched = made(strategy, world_size, seed=99)
    materialize(watched.optimizer)  # type: ignore[arg-type]
    reports = []
    for name in names:
        held = find_held(accelerator, watched.model, watched.optimizer, weights_only=False, dtype=None, restoring=True)
        found = restore_tensors(held, directory / name / "step-3", agreement)
        reports.append(agreement.gather("what was read", [found.wanted_bytes, found.read_bytes]))
        model = {key: _full(value) for key, value in watched.model.state_dict().items() if key != "head.weight"}
        moments = {
            f"{kind}.{key}": _full(value)
            for key, parameter in watched.model.named_parameters()
            for kind, value in watched.optimizer.state.get(parameter, {}).items()  # type: ignore[union-attr]
        }
        buffers = agreement.gather("buffers", watched.model.steps.item())  # type: ignore[operator, union-attr]
        assert buffers == [3] * world_size
        if rank == 0:
            into = directory / f"{name}-into-{strategy}-{world_size}"
            into.mkdir()
            save_file(model, into / "model.safetensors")
            save_file(moments, into / "optimizer.safetensors")
            (into / "read.json").write_text(json.dumps(reports[-1]))


def _full(value: Tensor) -> Tensor:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone().contiguous()
