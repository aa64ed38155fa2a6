"""A request to stop, left in the run's directory: rank zero sees it, and all ranks stop after the same step.

Nothing depends on a signal's way through a launcher and its agents.
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
# A look costs some microseconds; on a network file system more.
_LOOK_EVERY_S = 0.2
_LOOK_AGAIN_S = 0.3
# A step must end, and MLflow have the rest; and SLURM is exact to a minute.
_MAX_SHARE_OF_LEAD = 0.25


def ask_to_stop(run_dir: Path, reason: str) -> None:
    """Ask the attempt at a run that is at work to save and to stop in good order.

    Effects: not collective; any host that sees the directory; blocks on fsync; leaves ``<run_dir>/stop.json``.

    Raises:
        RunDirError: if there is no such run, or nobody is at work on it.
    """
    asked = None
    while (attempt := _attempt(run_dir)) != asked:
        if is_held(run_dir) is False:
            raise RunDirError(f"{run_dir}: no job is at work on it")
        replace_file(run_dir / FILE, json.dumps({"attempt": attempt, "reason": reason, "asked_s": time.time()}))
        # A job that has just begun holds the run, and counts its attempt a moment later.
        asked = attempt
        time.sleep(_LOOK_AGAIN_S)


def _attempt(run_dir: Path) -> int:
    try:
        # Read here, and not by `run_directory`: importing that takes seconds, and this is in a hurry.
        return int(json.loads((run_dir / "run.json").read_text()).get("attempt", 1))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunDirError(f"{run_dir}: is not the directory of a run ({error}); give runs/<run_name>") from error


class StopLead:
    """How long before its end a job is asked to stop, against how long a checkpoint takes.

    Args:
        environment: ``HARNESS_STOP_LEAD_S`` is that time in seconds; slurm/train.sbatch sets it.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        lead_s = environment.get("HARNESS_STOP_LEAD_S", "")
        self._lead_s = float(lead_s) if lead_s.isdigit() else math.inf
        # After a request to stop, how long MLflow may be waited for.
        self.delivery_s = self._lead_s * _MAX_SHARE_OF_LEAD if lead_s.isdigit() else 0.0

    def check(self, durable_s: float) -> str | None:
        """A line for the user, once, where a checkpoint takes too much of that time to be on disk."""
        if durable_s <= self._lead_s * _MAX_SHARE_OF_LEAD:
            return None
        lead_s, self._lead_s = self._lead_s, math.inf
        return (
            f"a checkpoint takes {durable_s:.0f} s to be on disk, and the job is asked to stop {lead_s:.0f} s before "
            f"its time limit; submit it with --lead_s {math.ceil(durable_s / _MAX_SHARE_OF_LEAD)} or more"
        )


@dataclass
class StopRequests:
    """Rank zero's look at the requests for its own attempt.

    Effects: not collective; main thread; reads the disk at most five times a second.

    Args:
        run_dir: the run's directory.
        attempt: which in a row is this one; what an earlier one was asked for is nothing to it.
    """

    run_dir: Path
    attempt: int
    _next_s: float = 0.0
    _reason: str | None = None

    def look(self) -> str | None:
        """Why this attempt is to stop; None: nobody has asked."""
        if self._reason is None and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOOK_EVERY_S
            self._reason = self._read()
        return self._reason

    def _read(self) -> str | None:
        try:
            record = json.loads((self.run_dir / FILE).read_text())
            return str(record["reason"]) if record["attempt"] == self.attempt else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
