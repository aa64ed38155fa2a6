"""The state of training and the context shared by the parts of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.data.resumable_loader import ResumableLoader
from harness.distributed.collectives import Collectives
from harness.io.progress import Progress
from harness.training.run_session import RunSession


@dataclass
class TrainingState:
    """The position of training. `TrainingController` alone changes it; every rank has the same values.

    Args:
        data: the position in the training data.

    Attributes:
        epoch: complete epochs.
        step: complete optimizer steps.
        samples_per_batch: batch size of the current loader over all ranks; None if unknown.
        is_stopped: training was ended permanently before its last epoch.
        is_ending: no further batch is read.
        is_cut_short: the current epoch ended before its last batch.
        rng_override: RNG states that a checkpoint holds in place of the current ones: those at the first evaluation
            since the last training batch, or those before the next epoch. None for the current ones.
    """

    data: ResumableLoader
    epoch: int = 0
    step: int = 0
    samples_per_batch: int | None = None
    is_stopped: bool = False
    is_ending: bool = False
    is_cut_short: bool = False
    rng_override: dict[str, Any] | None = None

    @property
    def step_name(self) -> str:
        """Name of a checkpoint of the current step."""
        return f"step-{self.step:08d}"


@dataclass(frozen=True)
class TrainingContext:
    """The objects and configuration that the parts of one run share."""

    accelerator: Accelerator
    collectives: Collectives
    session: RunSession
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    progress: Progress

    def say(self, line: str) -> None:
        """Print a line from rank zero."""
        if self.collectives.rank == 0:
            self.progress.say(line)

    def warn(self, line: str) -> None:
        """Print a warning from rank zero."""
        self.say(f"harness: warning: {line}")
