"""Ranks that train what a configuration says, are stopped or killed, and go on as more or fewer of them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.__main__ import main
from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
from harness.config.task import StepOutput
from harness.errors import HarnessError, Stopped
from harness.training.app import train
from tests.distributed.restoring_ranks import become_rank_of

NUM_SAMPLES = 48
NUM_EPOCHS = 4


class Line:
    """A line through noise; each rank writes down which samples it has had, and may be stopped at a batch.

    Args:
        directory: for the samples.
        batch_size: of one rank.
        signal_at: the batch in which `signalled_rank` gets SIGTERM; 0: none.
        signalled_rank: of the two signals.
        signal_at_eval: the batch of evaluation in which it gets SIGUSR1; 0: none.
        stuck_at: the batch in which that rank's writer process is stopped, until 2 s after the signal.
    """

    def __init__(
        self,
        directory: str,
        batch_size: int,
        signal_at: int = 0,
        signalled_rank: int = 0,
        signal_at_eval: int = 0,
        stuck_at: int = 0,
    ) -> None:
        self.directory, self.batch_size = Path(directory), batch_size
        self.signal_at, self.signalled_rank = signal_at, signalled_rank
        self.signal_at_eval, self.stuck_at = signal_at_eval, stuck_at
        self.num_batches = self.num_eval_batches = 0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def _data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(NUM_SAMPLES, 3, generator=generator)
        return TensorDataset(torch.arange(NUM_SAMPLES), inputs, inputs.sum(1, keepdim=True))

    def train_data(self) -> DataLoader[Any]:
        return DataLoader(self._data(), self.batch_size, shuffle=True)

    def eval_data(self) -> DataLoader[Any]:
        return DataLoader(self._data(), self.batch_size)

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        indices, inputs, targets = batch
        if torch.is_grad_enabled():  # DeepSpeed's engine is in training for good
            # So long that the ranks vote at each step.
            time.sleep(0.15)
            self.num_batches += 1
            rank = int(os.environ["RANK"])
            with (self.directory / f"seen-{rank}.jsonl").open("a") as log:
                log.write(json.dumps(indices.tolist()) + "\n")
            if self.num_batches == self.stuck_at and rank == self.signalled_rank:
                os.kill(writer_process(), signal.SIGSTOP)
            if self.num_batches == self.signal_at and rank == self.signalled_rank:
                os.kill(os.getpid(), signal.SIGTERM)
                if self.stuck_at:
                    threading.Timer(2.0, os.kill, (writer_process(), signal.SIGCONT)).start()
        elif self.signal_at_eval:
            time.sleep(0.15)
            self.num_eval_batches += 1
            if self.num_eval_batches == self.signal_at_eval and int(os.environ["RANK"]) == self.signalled_rank:
                os.kill(os.getpid(), signal.SIGUSR1)
        loss = (model(inputs) - targets).square().mean()
        return StepOutput(loss, len(inputs), {})


def writer_process() -> int:
    """Of this rank."""
    me = Path(f"/proc/{os.getpid()}/task")
    children = [int(pid) for each in me.glob("*/children") for pid in each.read_text().split()]
    (found,) = [
        pid for pid in children if b"harness.checkpoint.save.writer" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def train_on_disks_of_their_own(rank: int, world_size: int, port: int, directory: Path, task: dict[str, Any]) -> None:
    """As `train_some`, where the same path is another directory for each rank; leaves what came of it."""
    os.chdir(directory / str(rank))
    said = "nothing"
    try:
        train_some(rank, world_size, port, Path("runs"), "seen", task)
    except HarnessError as error:
        said = f"{type(error).__name__}: {error}"
    (directory / f"said-{rank}").write_text(said)


def train_words(
    rank: int, world_size: int, port: int, strategy: str, cwd: Path, words: list[str], output: str | None = None
) -> None:
    """What the command line does under `accelerate launch`; what the ranks print is in the file `output` of `cwd`."""
    become_rank_of(strategy, rank, world_size, port)
    os.chdir(cwd)
    if output is not None:
        said = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
    if code := main(words, prog="harness"):
        os._exit(code)


def train_some(
    rank: int,
    world_size: int,
    port: int,
    directory: Path,
    attempt: str,
    task: dict[str, Any],
    strategy: str = "ddp",
    every_n_steps: int | None = None,
) -> None:
    """One attempt; ends with the exit code of the program, and leaves the final metrics of rank zero."""
    become_rank_of(strategy, rank, world_size, port)
    own = directory / attempt
    own.mkdir(exist_ok=True)
    config = RunConfig(
        task=ClassSpec("tests.distributed.resuming_ranks.Line", {"directory": str(own), **task}),
        run_dir=str(directory),
        run_name="run",
        trainer=TrainerConfig(max_epochs=NUM_EPOCHS, progress_bar=False),
        checkpoint=CheckpointConfig(every_n_epochs=1, every_n_steps=every_n_steps, when_busy="wait"),
        tracking=TrackingConfig(enabled=False, log_every_n_steps=1),
    )
    try:
        logger = train(config)
    except Stopped as error:
        # The gloo groups' destructors would wait for ranks that are gone.
        os._exit(error.exit_code)
    if rank == 0:
        (directory / "end.json").write_text(json.dumps({"step": logger.step, **logger.latest}))
