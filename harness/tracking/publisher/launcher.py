"""Start the publisher from the trainer, restart it when it dies, and wait for it.

The settings are sent on standard input, because a tracking URI may contain a password. They are also kept, without the
password, in ``settings.json`` for `harness sync`.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.io.child_process import child_command
from harness.io.durable_files import open_private, read_record, replace_file
from harness.tracking.publisher.progress import DEAD_AFTER_S, seconds_since_heartbeat

LOG = "publisher.log"
SETTINGS = "settings.json"
# Exit code if the run's end is delivered but its files are not.
FILES_LEFT = 3
# A longer log is renamed before the next start; an unreachable store adds a few lines a minute.
MAX_LOG_BYTES = 8_000_000
_CHECK_EVERY_S = 10.0
_MAX_STARTS = 3
# Time for the interpreter's start and its imports.
_START_MARGIN_S = 60.0

# Defaults of environment variables. With MLflow's, a request to an unreachable server blocks for 246 s. The publisher
# retries instead of MLflow, which would create a run or a model again without searching for it first.
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}

# Not passed on, because the publisher is not a rank.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class PublisherDiedError(TrackingError):
    """The publisher died before it responded, for example out of memory. A restart may help."""


class PublisherProcess:
    """Starts, restarts and awaits the publisher's process.

    Effects: not collective; rank 0 only; main thread; `start` and `wait` block.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self.process: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0  # monotonic
        self._started_at_s = 0.0  # since the epoch
        self._next_check_s = 0.0

    def start(self) -> tuple[str, list[str]]:
        """Start the publisher, restarting it if it dies; return the MLflow run's id and messages for the user.

        Raises:
            TrackingError: if the run cannot be opened, or the publisher does not respond in time.
        """
        for num_starts in range(1, _MAX_STARTS + 1):
            self._start({**self._settings, "is_awaited": True})
            assert self.process is not None
            try:
                limit_s = self._settings["start_timeout_s"] + self._settings["lock_timeout_s"]
                return read_response(self.process, self._run_dir, limit_s)
            except PublisherDiedError:
                self.detach()
                self.process.kill()
                self.process.wait()
                if num_starts == _MAX_STARTS:
                    raise
            except BaseException:
                self.detach()
                with suppress(subprocess.TimeoutExpired):  # a publisher that has reported an error exits
                    self.process.wait(timeout=5)
                raise
        raise AssertionError

    def restart_if_dead(self) -> None:
        """Start the publisher again if it has died or hangs. Usually costs one or two system calls."""
        if self.process is None or (self.process.poll() is None and not self._kill_if_hung()):
            return
        if time.monotonic() - self._started_s < _CHECK_EVERY_S:
            return
        self.detach()
        # The response is not awaited, so training is not blocked. If memory is short, a later call retries.
        with suppress(OSError):
            self._start(self._settings)

    def wait(self, keep_waiting: Callable[[], bool]) -> None:
        """Wait until everything is delivered or `keep_waiting`, called about twice a second, returns False."""
        assert self.process is not None
        while self.process.poll() not in (0, FILES_LEFT) and keep_waiting():
            self.restart_if_dead()
            with suppress(subprocess.TimeoutExpired):
                if self.process.wait(timeout=0.5) != 0:
                    time.sleep(0.5)  # until it may be restarted

    def detach(self) -> None:
        """Close the pipes. The publisher then retries for a limited time and exits."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()

    def _start(self, settings: Mapping[str, Any]) -> None:
        self._started_s, self._started_at_s = time.monotonic(), time.time()
        self.process = start_publisher(self._run_dir, settings)

    def _kill_if_hung(self) -> bool:
        """Kill a publisher whose heartbeat has stopped; its successor repeats the idempotent delivery."""
        assert self.process is not None
        if time.monotonic() < self._next_check_s:
            return False
        self._next_check_s = time.monotonic() + _CHECK_EVERY_S
        if seconds_since_heartbeat(self._run_dir / "outbox", self._started_at_s) < DEAD_AFTER_S:
            return False
        self.process.kill()
        self.process.wait()
        return True


def start_publisher(run_dir: Path, settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    """Start the publisher's process and send it its settings."""
    path = run_dir / "outbox" / LOG
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        # A publisher that is still running continues to write to the renamed file.
        path.replace(path.with_suffix(".log.1"))
    with open(path, "ab", opener=open_private) as log:
        publisher = subprocess.Popen(
            child_command("harness.tracking.publisher.process", str(run_dir)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=_publisher_environment(),
            # A new session, so that Ctrl-C does not end the process that reports the run's end.
            start_new_session=True,
        )
    assert publisher.stdin is not None
    # The pipe remains open until the trainer exits, which the publisher detects.
    publisher.stdin.write(json.dumps(settings).encode() + b"\n")
    publisher.stdin.flush()
    return publisher


def read_response(publisher: subprocess.Popen[bytes], run_dir: Path, start_timeout_s: float) -> tuple[str, list[str]]:
    """Wait for the publisher's response and return the MLflow run's id and messages for the user.

    Raises:
        PublisherDiedError: if the publisher dies before it responds.
        TrackingError: if the publisher reports an error or does not respond in time.
    """
    assert publisher.stdout is not None
    limit_s = start_timeout_s + _START_MARGIN_S
    ready, _, _ = select.select([publisher.stdout], [], [], limit_s)
    line = publisher.stdout.readline() if ready else b""
    if not ready:
        raise TrackingError(
            f"tracking: the publisher gave no answer within {limit_s:.0f} s; see {run_dir}/outbox/{LOG}"
        )
    if not line:
        raise PublisherDiedError(f"tracking: the publisher ended before it had a run; see {run_dir}/outbox/{LOG}")
    response = json.loads(line)
    if "error" in response:
        raise TrackingError(response["error"])
    return response["run_id"], response.get("notes", [])


def write_settings(outbox_dir: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings for `harness sync`. The address must be absolute and without a password."""
    replace_file(outbox_dir / SETTINGS, json.dumps(dict(settings), indent=2) + "\n", is_private=True)


def read_settings(outbox_dir: Path) -> dict[str, Any] | None:
    """Read the kept settings; None if the run was not tracked.

    Raises:
        TrackingError: if the file is damaged.
    """
    settings = read_record(outbox_dir / SETTINGS)
    if settings is None and (outbox_dir / SETTINGS).exists():
        raise TrackingError(f"{outbox_dir / SETTINGS}: is damaged; the run's next attempt writes it again")
    return settings


def _publisher_environment() -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in _RANK_VARIABLES}
    environment.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    for key, value in _DEFAULTS.items():
        environment.setdefault(key, value)
    return environment
