"""Define the settings of autologging, and name the runs of a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config.schema import CheckpointConfig, TrackingConfig

# Names the run of the process's first training, in the directory of a later training's run.
FURTHER_FILE = "further_training.json"


@dataclass(frozen=True)
class AutologSettings:
    """Configures one training; fields not listed are as in `autolog` and `PeriodicLogger`.

    Args:
        exclusive: log to a separate run, even if the script has an active MLflow run.
        run_name: name of the first training's run and directory; None for one generated from the script's name.
        first_run: run name of the process's first training, for later ones.
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
    """Return a run name for this script: its file name, limited to characters allowed in a directory's name."""
    stem = Path(sys.argv[0]).stem or "run"
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    return kept.lstrip(".") or "run"


def first_run_of(run_dir: Path) -> Path:
    """Return the run directory of the script's first training, given that of any of its trainings."""
    try:
        name = json.loads((run_dir / FURTHER_FILE).read_text())["first_run"]
    except (OSError, ValueError, KeyError):
        return run_dir
    return run_dir.resolve().parent / str(name)


def run_record(settings: AutologSettings) -> Mapping[str, Any] | None:
    """Return the record in the run's directory; None without a record, or without a run name."""
    if settings.run_name is None:
        return None
    try:
        found = json.loads((Path(settings.run_dir) / settings.run_name / "run.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def run_id_of(settings: AutologSettings) -> str | None:
    """Return the id of the MLflow run that a training resumes, if known before the training begins; None otherwise."""
    record = None if settings.resume_from == "never" else run_record(settings)
    found = (record or {}).get("run_id")
    return None if found is None else str(found)
