"""The settings of autologging, and the names of the runs that a script makes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.schema import CheckpointConfig, TrackingConfig

# In the directory of a run that is not its process's first: the name of the first run.
FURTHER_FILE = "further_training.json"


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


def script_name() -> str:
    """A name for runs of this script: its file's, in the characters that a directory may have."""
    stem = Path(sys.argv[0]).stem or "run"
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return kept.lstrip(".") or "run"


def first_run_of(run_dir: Path) -> Path:
    """The run's directory of the first training of the script that has made this one."""
    try:
        name = json.loads((run_dir / FURTHER_FILE).read_text())["first_run"]
    except (OSError, ValueError, KeyError):
        return run_dir
    return run_dir.resolve().parent / str(name)


def run_record(settings: AutologSettings) -> Mapping[str, Any] | None:
    """What is known of the run of this name; None: nothing, or none is named."""
    if settings.run_name is None:
        return None
    try:
        found = json.loads((Path(settings.run_dir) / settings.run_name / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def run_id_of(settings: AutologSettings) -> str | None:
    """The MLflow run that a training would go on in, where that is known before it begins."""
    record = None if settings.resume_from == "never" else run_record(settings)
    found = (record or {}).get("run_id")
    return None if found is None else str(found)
