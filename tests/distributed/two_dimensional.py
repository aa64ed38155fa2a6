"""Ranks with FSDP2 and tensor parallelism in one model, saved by the engine and gathered beside it."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from tests.checkpoint_hooks import NoHooks
from tests.distributed.saving_ranks import become_rank, writer_of


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(torch.relu(self.up(x))))


def save_two_dimensional(rank: int, world_size: int, port: int, directory: Path) -> None:
    """One rank of a 2 x 2 mesh, started by `multiprocessing`."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = Mlp()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    config = CheckpointConfig(when_busy="wait")
    saver = Saver(accelerator, Collectives(rank, world_size), config, directory / "checkpoints", RunFacts(), NoHooks())
    saver.check(Watched(model, optimizer, None))
    for step in range(1, 4):
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        full = {name: _full(value) for name, value in model.named_parameters()}
        moments = {
            f"{kind}.{name}": _full(value)
            for name, parameter in model.named_parameters()
            for kind, value in optimizer.state[parameter].items()
        }
        saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        if rank == 0:
            (directory / "expected" / f"step-{step:08d}").mkdir(parents=True)
            save_file(full, directory / "expected" / f"step-{step:08d}" / "model.safetensors")
            save_file(moments, directory / "expected" / f"step-{step:08d}" / "optimizer.safetensors")
    if rank == 0:
        (directory / "placements").write_text(
            "\n".join(f"{name} {value.placements}" for name, value in model.named_parameters())  # type: ignore[attr-defined]
        )
    saver.close()


def train_on_while_saves_are_skipped(rank: int, world_size: int, port: int, directory: Path) -> None:
    """FSDP2, an evaluation before each save; three saves of six are skipped, each for another reason.

    A seventh, which must not be lost, meets the last of these reasons.
    """
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = Mlp()
    fully_shard(model.up)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    collectives = Collectives(rank, world_size)
    saver = Saver(accelerator, collectives, CheckpointConfig(), directory / "checkpoints", RunFacts(), NoHooks())
    saver.check(Watched(model, optimizer, None))

    def train() -> None:
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(step: int) -> tuple[bool, bool]:
        """Return whether this rank has started, and, after the next step, whether all ranks have."""
        train()
        with torch.no_grad():
            model(torch.randn(4, 6))  # its root keeps what it has gathered
        if step == 1:
            saver.prepare()
        begun = saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        train()
        return begun, saver.resolve()

    assert save(1) == (True, True)
    saver.wait()
    if rank == 0:
        os.kill(writer_of(saver), signal.SIGSTOP)
    assert save(2) == (True, True)
    # Rank zero has not committed, so all are busy.
    assert save(3) == (False, False)
    if rank == 0:
        os.kill(writer_of(saver), signal.SIGCONT)
    saver.wait()
    goes_on = threading.Event()
    if rank == 0:
        saver._saving = saver._runner.submit(lambda: _wait(goes_on))
    # Rank zero alone is busy: the other has begun before it could know.
    assert save(4) == (rank == 1, False)
    goes_on.set()
    saver.wait()
    saver._must_prepare = rank == 1
    assert save(5) == (rank == 0, False)
    saver.wait()
    assert save(6) == (True, True)
    train()
    saver._must_prepare = rank == 1
    # No step lies between this and the end: there would be nobody to save it later.
    assert saver.save(Moment("step-00000007", 0, 7, 0, {}), must=True)
    saver.wait()
    assert saver.status.startswith("step-00000007 written"), saver.status
    assert saver.num_skipped == 3
    assert saver.num_failed == 0
    saver.close()


def _wait(event: threading.Event) -> None:
    event.wait()


def _full(value: Tensor) -> Tensor:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().clone().contiguous()
