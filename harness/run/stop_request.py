"""A stop request in the run's directory. Rank zero reads it, and all ranks stop after the same step.

Unlike a signal it does not depend on a launcher and its agents.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import RunDirError
from harness.io.durable_files import replace_file
from harness.run.lock import is_held

FILE = "stop.json"
# A read takes some microseconds, and more on a network file system.
_POLL_S = 0.2
_CHECK_AGAIN_S = 0.3
# The rest of the lead is for the current step and for MLflow. SLURM's time limits are exact to a minute.
_MAX_SHARE_OF_LEAD = 0.25


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Ask the running attempt of a run to save and stop.

    Effects: not collective; any host that sees the directory; blocks on fsync; leaves ``<run_dir>/stop.json``.

    Raises:
        RunDirError: if the directory holds no run, or no job works on it.
    """
    asked = None
    while (attempt := _attempt(run_dir)) != asked:
        if is_held(run_dir) is False:
            raise RunDirError(f"{run_dir}: no job is at work on it")
        replace_file(run_dir / FILE, json.dumps({"attempt": attempt, "reason": reason, "asked_s": time.time()}))
        # A job that has just started locks the run first and writes its attempt a moment later: look again.
        asked = attempt
        time.sleep(_CHECK_AGAIN_S)


def _attempt(run_dir: Path) -> int:
    try:
        # Read here, as importing `harness.run.directory` takes seconds and a stop is urgent.
        return int(json.loads((run_dir / "run.json").read_text()).get("attempt", 1))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunDirError(f"{run_dir}: is not the directory of a run ({error}); give runs/<run_name>") from error


class StopLead:
    """Compare the time between a stop request and the job's end with the time that a checkpoint takes.

    ``HARNESS_STOP_LEAD_S`` is that lead in seconds; slurm/train.sbatch sets it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        lead_s = environment.get("HARNESS_STOP_LEAD_S", "")
        self._lead_s = float(lead_s) if lead_s.isdigit() else math.inf
        # The longest wait for MLflow after a request to stop.
        self.delivery_s = self._lead_s * _MAX_SHARE_OF_LEAD if lead_s.isdigit() else 0.0

    def check(self, durable_s: float) -> str | None:
        """Return a warning for the user, once, if a checkpoint takes too large a share of the lead to be durable."""
        if durable_s <= self._lead_s * _MAX_SHARE_OF_LEAD:
            return None
        lead_s, self._lead_s = self._lead_s, math.inf
        return (
            f"a checkpoint takes {durable_s:.0f} s to be on disk, and the job is asked to stop {lead_s:.0f} s before "
            f"its time limit; submit it with --lead_s {math.ceil(durable_s / _MAX_SHARE_OF_LEAD)} or more"
        )


@dataclass
class StopRequests:
    """Read the stop requests for this attempt, on rank zero; requests for earlier attempts are ignored.

    Effects: not collective; main thread; reads the disk at most five times a second.
    """

    run_dir: Path
    attempt: int
    _next_s: float = 0.0
    _reason: str | None = None

    def look(self) -> str | None:
        """Return the reason to stop, or None without a request."""
        if self._reason is None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _POLL_S
            self._reason = self._read()
        return self._reason

    def _read(self) -> str | None:
        try:
            record = json.loads((self.run_dir / FILE).read_text())
            return str(record["reason"]) if record["attempt"] == self.attempt else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
