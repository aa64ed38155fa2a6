"""One checkpoint from due to committed: who takes part, who writes, and what when it fails.

all ranks, main thread:   agree whether to save -> gather state and random states
rank zero, own thread:    write files -> manifest -> rename -> tell the caller
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from harness import random_state
from harness.agreement import Agreement
from harness.checkpoint import commit
from harness.checkpoint.commit import Manifest
from harness.checkpoint.gather import GatheredState, gather_state
from harness.checkpoint.write import write_state
from harness.config import CheckpointConfig
from harness.errors import CheckpointError, HarnessError

_WRITE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Moment:
    """Which moment of training a checkpoint is of.

    Args:
        name: of its directory: ``epoch-0005`` or ``step-00001200``.
        epoch: epochs that are complete.
        step: optimizer steps that are complete.
        batches_in_epoch: batches of the running epoch that each rank has taken.
        metrics: the latest reduced metrics.
    """

    name: str
    epoch: int
    step: int
    batches_in_epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Watched:
    """What a checkpoint is of: the prepared objects."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any


class Saver:
    """Saves when told to, at most one at a time.

    Effects: `save` and `close` are collective and for the main thread, `save` between steps; they
    block as said there. One background thread, on rank zero. Leaves ``<checkpoints_dir>/<name>/``.

    Args:
        accelerator: which ranks and which strategy.
        agreement: for what the ranks decide alike.
        config: what to save, and what if busy.
        checkpoints_dir: where to.
        topology: for the manifest.
        versions: for the manifest.
        committed: called in the background thread, on rank zero, with each committed checkpoint.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        agreement: Agreement,
        config: CheckpointConfig,
        checkpoints_dir: Path,
        topology: Mapping[str, str],
        versions: Mapping[str, str],
        committed: Callable[[str, Manifest], None],
    ) -> None:
        self._accelerator = accelerator
        self._agreement = agreement
        self._config = config
        self._checkpoints_dir = checkpoints_dir
        self._topology = topology
        self._versions = versions
        self._committed = committed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="harness-writer")
        self._writing: Future[None] | None = None
        self._dtype = None if config.dtype is None else getattr(torch, config.dtype)
        self.status = "no checkpoint yet"
        self.num_skipped = 0
        self.last_error: Exception | None = None

    def save(self, moment: Moment, watched: Watched, *, must: bool = False) -> bool:
        """Take a checkpoint of this moment; whether it was begun (not skipped, being busy).

        With `must` it waits where it would be skipped.

        Blocks until the state is gathered on rank zero; the writing goes on behind.
        """
        if not self._agreement.from_rank_zero("decide on the checkpoint", lambda: self._may_begin(must)):
            self.num_skipped += 1
            return False
        weights_only = self._config.save_weights_only
        state = gather_state(
            self._accelerator, watched.model, None if weights_only else watched.optimizer, dtype=self._dtype
        )
        random_states = self._agreement.gather("random states", random_state.capture(self._accelerator.device))
        if self._accelerator.is_main_process:
            trainer_state = None if weights_only else self._trainer_state(moment, watched, state, random_states)
            self.status = f"writing {moment.name}"
            self._writing = self._thread.submit(self._write, moment, state, trainer_state)
        return True

    def check(self, watched: Watched) -> None:
        """Refuse, before training and on all ranks alike, what could not be saved.

        Raises:
            CheckpointError: if the scheduler's state is not JSON, or ZeRO has several parameter groups.
        """
        if self._config.save_weights_only:
            return
        is_zero = self._accelerator.distributed_type == DistributedType.DEEPSPEED
        if is_zero and watched.optimizer is not None and len(watched.optimizer.param_groups) > 1:
            raise CheckpointError(
                "optimizer: with DeepSpeed ZeRO only one parameter group can be saved so far, "
                f"got {len(watched.optimizer.param_groups)}; use one, or checkpoint.save_weights_only"
            )
        if watched.scheduler is None:
            return
        try:
            json.dumps(watched.scheduler.state_dict())
        except TypeError as error:
            raise CheckpointError(
                f"the state of {type(watched.scheduler).__name__} cannot be written as JSON ({error}); "
                "use checkpoint.save_weights_only, or a scheduler whose state_dict() is numbers and lists"
            ) from error

    def _may_begin(self, must: bool) -> bool:
        """Rank zero: whether the write before is done, or, if configured so, once it is."""
        skips = self._config.when_busy == "skip" and not must
        if self._writing is not None and not self._writing.done() and skips:
            self.status = "skipped one: the one before is still being written"
            return False
        self._await_write()
        return True

    def _await_write(self) -> None:
        if self._writing is not None:
            try:
                self._writing.result(timeout=_WRITE_TIMEOUT_S)
            except FutureTimeoutError as error:
                raise CheckpointError(
                    f"{self._checkpoints_dir}: the checkpoint before is not written after {_WRITE_TIMEOUT_S:.0f} s"
                ) from error

    def _write(self, moment: Moment, state: GatheredState, trainer_state: Mapping[str, Any] | None) -> None:
        """The background thread: never raises; a failed save leaves the checkpoints before it."""
        final = self._checkpoints_dir / moment.name
        begun_s = time.monotonic()
        try:
            temporary = commit.begin(final)
            try:
                files = write_state(temporary, state, trainer_state, self._config.max_shard_size_bytes)
                manifest = Manifest(
                    key=uuid.uuid4().hex,
                    epoch=moment.epoch,
                    step=moment.step,
                    time_ms=time.time_ns() // 1_000_000,
                    metrics=moment.metrics,
                    files=files,
                    topology=self._topology,
                    versions=self._versions,
                )
                commit.commit(temporary, final, manifest)
            except BaseException:
                commit.discard(temporary)
                raise
        except Exception as error:
            self.last_error = error
            self.status = f"{moment.name} FAILED: {error}"
            return
        self.last_error = None
        self.status = f"{moment.name} written in {time.monotonic() - begun_s:.1f} s"
        try:
            self._committed(moment.name, manifest)
        except HarnessError as error:
            # The checkpoint stands. The trainer's next metrics meet the same full disk, and end the run.
            self.status = f"{moment.name} written, but not published: {error}"

    def _trainer_state(
        self, moment: Moment, watched: Watched, state: GatheredState, random_states: list[dict[str, Any]]
    ) -> dict[str, Any]:
        scheduler = watched.scheduler
        scaler = self._accelerator.scaler
        return {
            "epoch": moment.epoch,
            "step": moment.step,
            "position": {"epoch": moment.epoch, "batches": moment.batches_in_epoch},
            "optimizer": {"param_groups": state.param_groups},
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random_states": random_states,
        }

    def close(self) -> None:
        """Wait for the write in flight.

        Raises:
            CheckpointError: on all ranks, if the last checkpoint could not be written.
        """
        self._agreement.from_rank_zero("finish the last checkpoint", self._finish)

    def _finish(self) -> None:
        self._await_write()
        self._thread.shutdown()
        if self.last_error is not None:
            raise CheckpointError(
                f"{self._checkpoints_dir}: the last checkpoint could not be written: {self.last_error}; free space "
                "there or use another run_dir"
            ) from self.last_error

    def abandon(self, timeout_s: float) -> None:
        """After a failure: let a write in flight finish for so many seconds. Not collective."""
        if self._writing is not None:
            try:
                self._writing.result(timeout=timeout_s)
            except FutureTimeoutError:
                self.status = "the last checkpoint was not finished"
        self._thread.shutdown(wait=False, cancel_futures=True)
