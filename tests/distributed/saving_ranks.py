"""Ranks that save all the time: each weight's value is the step, so that a torn checkpoint shows."""

from __future__ import annotations

import os
import resource
import signal
import socket
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError
from tests.checkpoint_hooks import NoHooks

NUM_WEIGHTS = 3_000_001


class Counting(torch.optim.Optimizer):
    """Adds one to each weight, and to a state of the same shape, in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["count"] = torch.zeros_like(parameter)
                parameter.add_(1)
                state["count"].add_(1)


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(NUM_WEIGHTS))
        self.second = nn.Parameter(torch.zeros(7, 11))
        self.register_buffer("steps", torch.tensor(0))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def become_rank(rank: int, world_size: int, port: int) -> None:
    """What a launcher would have set."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)


def save_for_ever(rank: int, world_size: int, port: int, directory: Path, transport: str, num_saves: int) -> None:
    """One rank, started by `multiprocessing`. Each has `directory`/<rank> where `transport` is gather."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    own = directory / str(rank) if transport == "gather" else directory
    checkpoints = own / "checkpoints"
    if rank == 0:
        checkpoints.mkdir(parents=True, exist_ok=True)
    model = Weights()
    optimizer = Counting(model)
    # Not prepared: DDP would want gradients. Every rank does the same, as DDP's ranks do.
    config = CheckpointConfig(when_busy="wait", transport=transport, timeout_s=20)  # type: ignore[arg-type]
    saver = Saver(accelerator, Collectives(rank, world_size), config, checkpoints, RunFacts(), NoHooks())
    saver.check(Watched(model, optimizer, None))
    for step in range(1, num_saves + 1):
        optimizer.step()
        model.steps.fill_(step)
        saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        if step == 1:
            (directory / f"ready-{rank}").touch()
    saver.close()


def save_with_trouble(rank: int, world_size: int, port: int, directory: Path, trouble: str) -> None:
    """Four saves; at the third, rank 1's writer meets a full disk (``full``), dies (``dead``) or hangs (``hung``)."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    model = Weights()
    optimizer = Counting(model)
    config = CheckpointConfig(when_busy="wait", timeout_s=6 if trouble == "hung" else 60)
    collectives = Collectives(rank, world_size)
    saver = Saver(accelerator, collectives, config, directory / "checkpoints", RunFacts(), NoHooks())
    saver.check(Watched(model, optimizer, None))
    for step in range(1, 5):
        optimizer.step()
        model.steps.fill_(step)
        is_troubled = step == 3 and rank == 1
        if is_troubled:
            writer = writer_of(saver)
            if trouble == "full":
                limits = resource.prlimit(writer, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            else:
                os.kill(writer, signal.SIGSTOP if trouble == "hung" else signal.SIGKILL)
        saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        if rank == 0:
            saver.wait()
            (directory / f"status-{step}").write_text(saver.status)
        collectives.all_gather_numbers("the end of a save", [step])
        if is_troubled and trouble == "full":
            resource.prlimit(writer, resource.RLIMIT_FSIZE, limits)
        if is_troubled and trouble == "hung":
            with suppress(ProcessLookupError):  # it was given up, and ended
                os.kill(writer, signal.SIGCONT)
    saver.close()


def save_what_differs(rank: int, world_size: int, port: int, directory: Path, where: str) -> None:
    """A weight, or a moment, of the last rank alone is changed by one bit; the file `said-<rank>` says what came."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    (directory / "checkpoints").mkdir(exist_ok=True)
    model = Weights()
    optimizer = Counting(model)
    saver = Saver(
        accelerator, Collectives(rank, world_size), CheckpointConfig(), directory / "checkpoints", RunFacts(), NoHooks()
    )
    saver.check(Watched(model, optimizer, None))
    optimizer.step()
    if rank == world_size - 1 and where != "nowhere":
        held = model.second if where == "model" else optimizer.state[model.second]["count"]
        held.data[3, 4] = torch.nextafter(held.data[3, 4], torch.tensor(9.0))
    said = "nothing"
    try:
        saver.prepare()
    except CheckpointError as error:
        said = str(error)
    (directory / f"said-{rank}").write_text(said)
    saver.close()


def writer_of(saver: Saver) -> int:
    """The process id of a rank's writer."""
    pipeline = saver._pipeline
    assert pipeline is not None and pipeline.writer._process is not None
    return pipeline.writer._process.pid
