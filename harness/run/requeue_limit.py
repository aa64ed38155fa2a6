"""Refuse a job that is requeued again and again without progress."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from harness.checkpoint.format.commit import list_checkpoints
from harness.distributed import slurm_env
from harness.errors import RunDirError
from harness.io.durable_files import replace_file

FILE = "restarts.json"


def count_start(run_dir: Path, max_idle: int, environment: Mapping[str, str] = os.environ) -> None:
    """Record that a job starts to work on a run, and at which step.

    Effects: not collective; any thread; blocks on fsync; leaves ``<run_dir>/restarts.json``.

    Raises:
        RunDirError: if more than `max_idle` consecutive starts of one job, by SLURM's variables in `environment`, begin
            at the same step. A newly submitted job is counted from zero.
    """
    job = slurm_env.read_job(environment)
    steps = [] if job is None or job.restart_count == 0 else _read(run_dir, job.identity)
    step = max((manifest.step for _, manifest in list_checkpoints(run_dir / "checkpoints")), default=0)
    idle = next((n for n, earlier in enumerate(reversed(steps)) if earlier != step), len(steps))
    if idle >= max_idle:
        raise RunDirError(
            f"{run_dir}: {idle} starts in a row have begun at step {step}, and none has left a checkpoint; it is not "
            "started again. See the job's log; submitted anew, it is counted anew"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    record = {"job": None if job is None else job.identity, "steps": [*steps, step]}
    replace_file(run_dir / FILE, json.dumps(record) + "\n")


def _read(run_dir: Path, job: str) -> list[int]:
    try:
        record = json.loads((run_dir / FILE).read_text())
    except (OSError, ValueError):
        return []
    return [int(step) for step in record["steps"]] if record["job"] == job else []
