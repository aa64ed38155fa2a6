"""What a run has left, in a line."""

from __future__ import annotations

import json
from pathlib import Path

from harness.checkpoint.commit import list_checkpoints


def what_there_is(run_dir: Path) -> str:
    """Where a run's checkpoints are, and its MLflow run; reads the run's directory."""
    names = [name for name, _ in list_checkpoints(run_dir / "checkpoints")]
    at = f" in {run_dir / 'checkpoints'}, the newest is {names[-1]}" if names else ""
    saved = f"{len(names)} checkpoint{'' if len(names) == 1 else 's'}{at}"
    record = json.loads((run_dir / "run.json").read_text())
    if record.get("run_id") is None:
        return saved
    return f"{saved}; MLflow run {record['run_id']} at {record.get('tracking_uri')}"
