"""What autologging was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.config.schema import CheckpointConfig, TrackingConfig


@dataclass(frozen=True)
class AutologSettings:
    """What autologging was asked for.

    Args:
        checkpoint: when and how checkpoints are written.
        tracking: what goes to MLflow.
        exclusive: what is logged here stays out of a run that the script has made.
        run_name: name of the run of the first training, and of its directory; None: made up, from the script's name.
        run_dir: the directory that the runs' directories are in.
        resume_from: as `PeriodicLogger`'s `resume_from_checkpoint`.
        reset_scheduler: as `PeriodicLogger` has it.
        first_run: name of the run of the process's first training, where this is for a later one.
    """

    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    exclusive: bool = False
    run_name: str | None = None
    run_dir: str = "runs"
    resume_from: str = "auto"
    reset_scheduler: bool = False
    first_run: str | None = None
