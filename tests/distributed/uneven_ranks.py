"""Ranks with different numbers of batches, in a script that knows nothing of harness, and in a loop of our own."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from tests.distributed.saving_ranks import become_rank

BATCH_SIZE = 2


@dataclass(frozen=True)
class Case:
    """A training, and what happens in it.

    Args:
        kind: ``joined``: DDP's join, and 6 and 5 batches; ``overridden``: the same, as `join_uneven_inputs` is told;
            ``accumulating``: the same without a join, as each two batches, and what is left, make a step; ``by_hand``:
            within a join each two batches make a step, and what is left none; ``stream``: within a join, batches of a
            data set without a length.
        num_epochs: of them.
        batches: of each rank, in a stream.
        log_every_n_steps: windows; None: none but the epochs'.
        every_n_steps: checkpoints by steps; None: none.
        every_n_epochs: checkpoints by epochs.
        is_joined_once: one join around all epochs, whose order is that of the data: to draw one, ranks would meet.
        leaves_behind: of each rank, the batch of an epoch behind which it leaves the loader.
        signal_at: (rank, batch of the training from 1, signal) that the rank sends itself.
        dies_at: (rank, batch of the training from 1) at which a rank raises.
        dies_behind: epochs after whose end all ranks are killed.
        other_optimizer_from: epochs after which the script makes another optimizer.
    """

    kind: str = "joined"
    num_epochs: int = 2
    batches: tuple[int, int] = (3, 5)
    log_every_n_steps: int | None = None
    every_n_steps: int | None = None
    every_n_epochs: int | None = 1
    is_joined_once: bool = False
    leaves_behind: tuple[int, int] | None = None
    signal_at: tuple[int, int, int] | None = None
    dies_at: tuple[int, int] | None = None
    dies_behind: int | None = None
    other_optimizer_from: int | None = None

    @property
    def settings(self) -> tuple[CheckpointConfig, TrackingConfig]:
        """Of harness."""
        checkpoint = CheckpointConfig(
            every_n_epochs=self.every_n_epochs, every_n_steps=self.every_n_steps, when_busy="wait"
        )
        return checkpoint, TrackingConfig(enabled=False, log_every_n_steps=self.log_every_n_steps)


class Stream(IterableDataset[Any]):
    """As many samples as one rank is to have, for each of them to take its part of."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __iter__(self) -> Iterator[Any]:
        inputs, targets = samples(self.num_samples)
        return zip(inputs, targets, strict=True)


def samples(num: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(num, 3, generator=generator), torch.randn(num, 1, generator=generator)


class JoiningOnCpus(Accelerator):
    """accelerate joins ranks on GPUs alone; torch's join, which it calls, does so on CPUs too."""

    is_joining = False

    @property
    def multi_device(self) -> bool:
        """What `join_uneven_inputs` asks."""
        return self.is_joining or super().multi_device

    @contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """As on GPUs."""
        self.is_joining = True
        with super().join_uneven_inputs(joinables, even_batches):
            self.is_joining = False
            yield


class Training:
    """A rank's script: model, data and what it keeps of them."""

    def __init__(self, case: Case, rank: int, world_size: int, directory: Path) -> None:
        self.case = case
        self.rank = rank
        self.directory = directory
        config = DataLoaderConfiguration(
            even_batches=case.kind in ("overridden", "even"), dispatch_batches=False if case.kind == "stream" else None
        )
        accumulation = 2 if case.kind == "accumulating" else 1
        self.accelerator = JoiningOnCpus(cpu=True, dataloader_config=config, gradient_accumulation_steps=accumulation)
        set_seed(3)
        model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.05)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.5)
        if case.kind == "stream":
            data = DataLoader(Stream(case.batches[rank] * BATCH_SIZE * world_size), BATCH_SIZE)
        else:
            data = DataLoader(TensorDataset(*samples(22)), BATCH_SIZE, shuffle=not case.is_joined_once)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler, data
        )
        self.num_batches = 0
        # By epoch: the loss of each batch and its number of samples.
        self.losses: list[list[tuple[float, int]]] = []

    def joined(self, *, is_around_all: bool) -> AbstractContextManager[Any]:
        if self.case.kind == "accumulating" or is_around_all != self.case.is_joined_once:
            return nullcontext()
        even = {"even_batches": False} if self.case.kind == "overridden" else {}
        return self.accelerator.join_uneven_inputs([self.model], **even)

    def train(self, batch: Any) -> Tensor:
        """One batch."""
        self.num_batches += 1
        self._happens()
        inputs, targets = batch
        with self.accelerator.accumulate(self.model):
            loss = nn.functional.mse_loss(self.model(inputs), targets)
            self.accelerator.backward(loss)
            if self.case.kind != "by_hand" or self.num_batches_of_epoch % 2 == 0:
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
        self.losses[-1].append((loss.item(), len(inputs)))
        return loss

    @property
    def num_batches_of_epoch(self) -> int:
        return len(self.losses[-1]) + 1

    @property
    def leaves(self) -> bool:
        """Whether this rank leaves the loader now."""
        behind = self.case.leaves_behind
        return behind is not None and len(self.losses[-1]) == behind[self.rank]

    def _happens(self) -> None:
        case = self.case
        if case.signal_at is not None and case.signal_at[:2] == (self.rank, self.num_batches):
            os.kill(os.getpid(), case.signal_at[2])
        if case.dies_at == (self.rank, self.num_batches):
            raise KeyError("a batch of this rank alone")

    def epoch_done(self, epoch: int) -> None:
        """Keep what the script has."""
        names = [name for name, _ in self.accelerator.unwrap_model(self.model).named_parameters()]
        moments = {
            f"{kind}.{names[index]}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for kind, value in state.items()
        }
        state = {"model": self.accelerator.unwrap_model(self.model).state_dict(), "optimizer": moments}
        torch.save(state, self.directory / f"state-{epoch + 1}-{self.rank}.pt")
        (self.directory / f"losses-{self.rank}.json").write_text(json.dumps(self.losses))


def _as_rank(rank: int, world_size: int, port: int, directory: Path) -> None:
    become_rank(rank, world_size, port)
    os.chdir(directory)
    said = os.open(f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)


def run_script(rank: int, world_size: int, port: int, directory: Path, case: Case) -> None:
    """A script under autologging."""
    _as_rank(rank, world_size, port, directory)
    checkpoint, tracking = case.settings
    switch = Patcher(AutologSettings(checkpoint, tracking, run_name="run", run_dir=str(directory), resume_from="auto"))
    switch.turn_on()
    try:
        _script(Training(case, rank, world_size, directory))
        logger = switch.session.logger
        assert logger is not None
        switch.finish()
        Path(f"latest-{rank}.json").write_text(json.dumps(logger.latest))
    except BaseException as error:
        switch.fail(error)
        raise


def _script(training: Training) -> None:
    with training.joined(is_around_all=True):
        for epoch in range(training.case.num_epochs):
            if epoch == training.case.dies_behind:
                for _ in training.loader:
                    _die_once_saved(training, epoch)
            if epoch == training.case.other_optimizer_from:
                other = torch.optim.SGD(training.model.parameters(), lr=0.01, momentum=0.9)
                training.optimizer = training.accelerator.prepare(other)
            training.losses.append([])
            with training.joined(is_around_all=False):
                for batch in training.loader:
                    training.train(batch)
                    if training.leaves:
                        break
            training.epoch_done(epoch)


def _die_once_saved(training: Training, epoch: int) -> None:
    """In the next epoch's first batch: the checkpoint of the one before is on its way."""
    manifest = training.directory / "run" / "checkpoints" / f"epoch-{epoch:04d}" / "manifest.json"
    for _ in itertools.count():
        if manifest.exists():
            os.kill(os.getpid(), signal.SIGKILL)


def run_own_loop(rank: int, world_size: int, port: int, directory: Path, case: Case) -> None:
    """A loop of a `PeriodicLogger`'s."""
    _as_rank(rank, world_size, port, directory)
    checkpoint, tracking = case.settings
    training = Training(case, rank, world_size, directory)
    with PeriodicLogger(
        training.accelerator,
        case.every_n_epochs,
        run_name="run",
        run_dir=directory,
        checkpoint=checkpoint,
        tracking=tracking,
    ) as logger:
        logger.watch(training.model, training.optimizer, training.scheduler)
        for epoch in logger.epochs(case.num_epochs):
            training.losses.append([])
            with training.joined(is_around_all=False):
                for batch in logger.batches(training.loader):
                    loss = training.train(batch)
                    logger.log({"train/loss": loss}, weight=len(batch[0]))
            training.epoch_done(epoch)
