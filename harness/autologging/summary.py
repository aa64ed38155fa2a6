"""What a run has left, in a line."""

from __future__ import annotations

import json
from pathlib import Path

from harness.checkpoint.commit import list_checkpoints


def what_there_is(run_dir: Path, *, is_done: bool) -> str:
    """Where a run's checkpoints are, and its MLflow run; reads the run's directory.

    Args:
        run_dir: of the run.
        is_done: whether training is complete; else the line says how it goes on.
    """
    names = [name for name, _ in list_checkpoints(run_dir / "checkpoints")]
    at = f" in {run_dir / 'checkpoints'}, the newest is {names[-1]}" if names else ""
    parts = [f"{len(names) or 'no'} checkpoint{'' if len(names) == 1 else 's'}{at}"]
    record = json.loads((run_dir / "run.json").read_text())
    if record.get("run_id") is not None:
        parts.append(f"MLflow run {record['run_id']} at {record.get('tracking_uri')}")
    if names and not is_done:
        parts.append(f"it goes on with `harness run --resume {run_dir}` and the script")
    return "; ".join(parts)
