"""A run that has ended well, to which a test or an evaluation still adds its metrics.

Nothing of the run is open between the end of training and the test: no lock, no signal handler, no publisher. The
metrics are appended to the journal with another end, as part of the same attempt, so the run is FINISHED in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import TrackingConfig
from harness.errors import HarnessError, TrackingError
from harness.metrics.values import LoggedValues
from harness.run.directory import read_run_record
from harness.run.lock import RunLock
from harness.tracking.journal.logged_points import Point
from harness.tracking.tracker import Tracker


@dataclass(frozen=True)
class EndedRun:
    """Adds metrics to a run that is FINISHED. Rank zero's.

    Args:
        path: the run's directory.
        name: of the run.
        config: what goes to MLflow.
        step: optimizer steps that were complete at its end.
        say: a line for the user.
    """

    path: Path
    name: str
    config: TrackingConfig
    step: int
    say: Callable[[str], None]

    def log(self, values: Mapping[str, Any]) -> None:
        """Append the metrics, at the last step, and wait for their delivery; see `LoggedValues` for what is a number.

        Effects: not collective; main thread; blocks at most ``tracking.start_timeout_s`` and
        ``tracking.drain_timeout_s``. What cannot be delivered stays in the journal for `harness sync`, and a line says
        so: a test does not fail because of it.
        """
        try:
            lock = RunLock(self.path)
        except (HarnessError, OSError) as error:
            self.say(f"harness: warning: {', '.join(values)} are not in the run: {error}")
            return
        try:
            self._log(LoggedValues(self.say).numbers(values))
        except (HarnessError, OSError) as error:
            self.say(
                f"harness: warning: {', '.join(values)} are not in MLflow: {error}; "
                f"`harness sync {self.path}` delivers what is in the journal"
            )
        finally:
            lock.release()

    def _log(self, values: Mapping[str, float]) -> None:
        # Another job may have resumed the run since.
        tracker = Tracker(self.path, self.config, read_run_record(self.path).get("attempt", 1))
        try:
            self._add(tracker, values)
        finally:
            tracker.journal.close()
            for line in tracker.pop_warnings():
                self.say(line)

    def _add(self, tracker: Tracker, values: Mapping[str, float]) -> None:
        # An evaluation that only repeats the last epoch's has given the same numbers.
        there = tracker.points_at(values, self.step)
        values = {
            key: value for key, value in values.items() if not _is_at(self.step, there.get(tracker.metric_name(key)))
        }
        if not values:
            return
        is_delivered = tracker.log_after_finish(
            self.name, values, self.step, "training is complete, and was evaluated", self.config.drain_timeout_s
        )
        if not is_delivered and self.config.enabled and not self.config.offline:
            raise TrackingError("not everything was delivered in time")


def _is_at(step: int, point: Point | None) -> bool:
    return point is not None and point.step == step
