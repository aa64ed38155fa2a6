"""Starting the publisher's process, and what it answers."""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.io.child_process import child_command
from harness.io.durable_files import open_private

LOG = "publisher.log"
# The publisher's exit code where the run's end is delivered, and files are not: the artifact store takes none.
FILES_LEFT = 3
# A publisher writes a few lines a minute at the most, while the store is away.
MAX_LOG_BYTES = 8_000_000

# What holds where the user has not set it. With MLflow's own limits a call to a dead server blocks for 246 s; how
# often something is tried is the publisher's affair (without end), and MLflow would send what makes a run or a model
# again without looking whether it was made.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}

# What a launcher sets for the ranks is not for the publisher: it is no rank, and needs no GPU.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PublisherDiedError(TrackingError):
    """It has ended without a word: killed, or out of memory. Started again, it may have more luck."""


def start_publisher(run_dir: Path, settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Start it; its settings go by its standard input, whose end tells it that this process is gone."""
    path = run_dir / "outbox" / LOG
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        # One that still writes goes on in the file that it has.
        path.replace(path.with_suffix(".log.1"))
    with open(path, "ab", opener=open_private) as log:
        publisher = subprocess.Popen(
            child_command("harness.tracking.publisher.process", str(run_dir)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_publisher_environment(),
            # A session of its own: Ctrl-C at the trainer must not end what reports it.
            start_new_session=True,
        )
    assert publisher.stdin is not None
    # By pipe, not by command line: a tracking URI may hold a password. The pipe is kept open: its end
    # tells the publisher that the trainer is gone.
    publisher.stdin.write(json.dumps(settings).encode() + b"\n")
    publisher.stdin.flush()
    return publisher


def read_answer(publisher: subprocess.Popen[bytes], run_dir: Path, start_timeout_s: float) -> tuple[str, list[str]]:
    """The id of the MLflow run and lines for the user, or the publisher's own error."""
    assert publisher.stdout is not None
    # The publisher keeps the limit itself; the margin is for its own start.
    limit_s = start_timeout_s + 60
    ready, _, _ = select.select([publisher.stdout], [], [], limit_s)
    line = publisher.stdout.readline() if ready else b""
    if not ready:
        raise TrackingError(
            f"tracking: the publisher gave no answer within {limit_s:.0f} s; see {run_dir}/outbox/{LOG}"
        )
    if not line:
        raise PublisherDiedError(f"tracking: the publisher ended before it had a run; see {run_dir}/outbox/{LOG}")
    answer = json.loads(line)
    if "error" in answer:
        raise TrackingError(answer["error"])
    return answer["run_id"], answer.get("notes", [])


def _publisher_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    environment.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    for key, value in _DEFAULTS.items():
        environment.setdefault(key, value)
    return environment
