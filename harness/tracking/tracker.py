"""Append what the trainer logs to the journal, which the publisher's process delivers to MLflow.

The trainer never imports mlflow and never uses the network.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from harness.config.schema import Mode, TrackingConfig
from harness.errors import TrackingError
from harness.io.durable_files import read_record, replace_file
from harness.io.redact import remember, without_password
from harness.run.directory import read_run_record
from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.journal.logged_points import (
    UNKNOWN_TIME_MS,
    Drift,
    KnownPoints,
    Logged,
    Point,
    drift,
    points_at,
    read_logged,
)
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.given_run import EXPERIMENT_ID, GivenRun, absolute_sqlite, is_active, mark_used
from harness.tracking.mlflow.mlmodel import newest_model_spec, write_model_spec
from harness.tracking.mlflow.names import NameCleaner, clean_key
from harness.tracking.publisher.launcher import PublisherProcess, write_settings
from harness.tracking.publisher.progress import DeliveryProgress, Remaining

# How long the previous attempt's publisher may need to finish its current delivery.
_LOCK_TIMEOUT_S = 30.0
# File in the outbox: context -> the run's data set in that context.
_DATASETS = "datasets.json"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Logs one attempt at a run to the journal, and starts, supervises and awaits the publisher.

    Effects: rank 0 only; not collective. `start`, `finish` and `log_after_finish` block, with time limits. `sync`,
    `log_model_spec`, `log_dataset`, `log_checkpoint` and `retire_checkpoint` block on fsync. `resume_from` and
    `points_at` read the journal. The other methods only append to a file. Leaves ``<run_dir>/outbox/`` and, through the
    publisher, ``run.json`` and ``attempts.json``.

    Args:
        run_dir: the run's directory; no other trainer may write to it.
        config: the section ``tracking`` of the configuration.
        attempt: number of this attempt, from 1.
        monitor: the metric that ranks checkpoints; None for no ranking.
        mode: whether a lower or a higher value is better.

    Attributes:
        run_id: id of the MLflow run, once it is known.
        given_run: the existing MLflow run to use; None to create one. Set before `start`.
        notes: messages for the user from `start`.
        has_model_spec: whether this attempt has called `log_model_spec`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        attempt: int = 1,
        monitor: str | None = None,
        mode: Mode = "min",
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        remember(config.tracking_uri)
        self.attempt = attempt
        self.monitor, self.mode = monitor, mode
        self.given_run: GivenRun | None = None
        self.notes: list[str] = []
        self._warnings: list[str] = []
        self._names = NameCleaner()
        self._has_journal_problem = False
        self._outbox_dir = run_dir / "outbox"
        self.journal = JournalWriter(self._outbox_dir, config.max_outbox_bytes)
        self.run_id: str | None = None
        # The previous attempt's model spec, until `log_model_spec`.
        self._model_spec = newest_model_spec(self._outbox_dir)
        self.has_model_spec = False
        # Read before this attempt adds entries.
        self._logged = _read_logged(self._outbox_dir) if attempt > 1 else Logged({}, frozenset())
        self._known_datasets: dict[str, Any] = (read_record(self._outbox_dir / _DATASETS) or {}) if attempt > 1 else {}
        self._known_points: KnownPoints | None = None
        self._is_after_finish = self._is_user_run = False
        self._logged_repetition: dict[str, str] = {}
        self._last_step = 0
        self._publisher: PublisherProcess | None = None

    def start(self, run_name: str, facts: Mapping[str, str]) -> None:
        """Start the publisher and wait until the MLflow run exists and its id is on disk.

        Raises:
            TrackingError: if the store refuses the run or does not respond within ``tracking.start_timeout_s``.
        """
        # The previous attempt's publisher exits when it reads this first entry.
        self._log_facts(facts)
        self._start(run_name, _LOCK_TIMEOUT_S if self.attempt > 1 else 0.0)

    def _start(self, run_name: str, lock_timeout_s: float) -> None:
        if not self.config.enabled:
            return
        settings = self._publisher_settings(run_name, lock_timeout_s)
        if self.config.offline:
            run_id = None if self.given_run is None else self.given_run.run_id
            self._is_user_run = is_active(run_id)
            mark_used(run_id)
            self._keep_for_sync(settings)
            return
        self._publisher = PublisherProcess(self.run_dir, settings)
        self.run_id, notes = self._publisher.start()
        self.notes = [*(() if self.given_run is None else self.given_run.notes), *notes]
        self._is_user_run = is_active(self.run_id)
        mark_used(self.run_id)

    def _publisher_settings(self, run_name: str, lock_timeout_s: float) -> dict[str, Any]:
        """Return the settings in the format of ``settings.json``, which earlier and later versions read."""
        registered_name = self.config.registered_model_name
        if registered_name is not None:
            registered_name = self._names.clean("registered model", registered_name)
        return {
            "run_name": run_name,
            "tracking_uri": self.config.tracking_uri,
            "experiment_name": self.config.experiment_name,
            "registered_model_name": registered_name,
            "registered_model_aliases": self.config.registered_model_aliases,
            "monitor": self.monitor,
            "mode": self.mode,
            "start_timeout_s": self.config.start_timeout_s,
            "lock_timeout_s": lock_timeout_s,
            "attempt": self.attempt,
            "parent_run": self.config.parent_run,
            "max_upload_bytes_per_s": self.config.max_upload_bytes_per_s,
            "max_outbox_bytes": self.config.max_outbox_bytes,
            "offline": self.config.offline,
            # `mlflow.set_experiment` sets this variable.
            "experiment_id": None if self.config.experiment_name else os.environ.get(EXPERIMENT_ID) or None,
            "given_run": None if self.given_run is None else [self.given_run.run_id, self.given_run.source],
        }

    def _keep_for_sync(self, settings: Mapping[str, Any]) -> None:
        """Keep the settings of an offline run for `harness sync`, which may run in a different directory."""
        uri = settings["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        kept = {
            **settings,
            "tracking_uri": None if uri is None else without_password(absolute_sqlite(uri)),
            "experiment_name": settings["experiment_name"] or os.environ.get("MLFLOW_EXPERIMENT_NAME"),
        }
        write_settings(self._outbox_dir, kept)
        self.notes = [f"offline: nothing is sent to MLflow until `harness sync {self.run_dir}`"]

    def pop_warnings(self) -> list[str]:
        """Remove and return the pending warnings."""
        found = []
        for pending in (self._names.warnings, self.journal.warnings, self._warnings):
            while pending:
                found.append(pending.pop(0))
        return found

    def _log_facts(self, facts: Mapping[str, str]) -> None:
        self.journal.append("attempt", {"number": self.attempt, "facts": dict(facts)})

    def resume_from(self, step: int, checkpoint: str | None) -> KnownPoints:
        """Log the step from which the run resumes, and return the points that are logged from that step on.

        Args:
            step: completed optimizer steps.
            checkpoint: name of the checkpoint; None if the run starts from the beginning.
        """
        self._log_facts({"step_from": str(step)} | ({} if checkpoint is None else {"resumed_from": checkpoint}))
        self._known_points = KnownPoints(self._outbox_dir, step)
        self._last_step = step
        return self._known_points

    def log_params(self, values: Mapping[str, str]) -> Drift:
        """Log new parameters, and return the differences from earlier attempts.

        MLflow refuses a new value of a parameter, so a changed one is recorded as a fact of this attempt. Names that
        MLflow refuses are replaced with a warning, as are those of metrics, tags and texts.
        """
        found = drift(self._logged.params, self._names.clean_all("parameter", values))
        if found.added:
            self.journal.append("params", found.added)
        if found.changed:
            self._log_facts({"param_drift": found.as_json()})
        return found

    def has_checkpoint(self, key: str) -> bool:
        """Whether an earlier attempt has logged the checkpoint."""
        return key in self._logged.checkpoints

    def points_at(self, metrics: Mapping[str, float], step: int) -> dict[str, Point]:
        """Find the points of a checkpoint's metrics, by their names in MLflow; see `logged_points.points_at`."""
        return points_at(self._outbox_dir, self._names.clean_all("metric", metrics), step)

    def metric_name(self, name: str) -> str:
        """Return the name of a metric in MLflow."""
        return self._names.clean("metric", name)

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self.journal.append("tags", self._names.clean_all("tag", values))

    def log_metrics(self, values: Mapping[str, float], step: int, *, is_own_step: bool = False) -> dict[str, Point]:
        """Log metrics, except points that an earlier attempt has logged.

        Args:
            values: name -> number.
            step: completed optimizer steps.
            is_own_step: whether `step` is a script's own count, for example of epochs.

        Returns:
            The points by their names in MLflow; for a repeated one, the earlier attempt's. Points with an unknown time
            are omitted, because a model cannot refer to them.
        """
        if self._publisher is not None:
            self._publisher.restart_if_dead()
        values = self._names.clean_all("metric", values)
        if self.attempt > 1 and self._known_points is None and not self._is_after_finish:
            # Nothing was restored, so the run starts from the beginning.
            self.resume_from(0, None)
        if not is_own_step:
            self._last_step = max(self._last_step, step)
        points: dict[str, Point] = {}
        if self._known_points is not None:
            matches = {key: self._known_points.match(key, value, step) for key, value in values.items()}
            points = {key: point for key, point in matches.items() if point is not None}
            if not is_own_step and step > self._known_points.last_step:
                self._log_repetition()
        if new := {key: value for key, value in values.items() if key not in points}:
            body = {"step": step, "values": new}
            time_ms = self.journal.append("metrics", body | {"is_own_step": True} if is_own_step else body)
            self._check_journal()
            points |= {key: Point(value, time_ms, step) for key, value in new.items()}
        return {key: point for key, point in points.items() if point.time_ms != UNKNOWN_TIME_MS}

    def log_system_metrics(self, values: Mapping[str, float]) -> None:
        """Log the machines' utilization, with the seconds since the epoch as the step. Any thread."""
        self.journal.append("system", {"step": int(time.time()), "values": values})

    def _check_journal(self) -> None:
        """Warn when the journal starts to drop or buffer metrics, and when it accepts them again."""
        problem = self.journal.problem
        if (problem is not None) == self._has_journal_problem:
            return
        self._has_journal_problem = problem is not None
        if problem is None:
            self._log_dropped()
        num_dropped = self.journal.num_dropped
        lost = f"{num_dropped} metrics entries were dropped" if num_dropped else "nothing was lost"
        self._warnings.append(problem or f"{self.journal.path}: accepts entries again; {lost}")

    def _log_dropped(self) -> None:
        if self.journal.num_dropped:
            self._log_facts({"metrics_left_out": str(self.journal.num_dropped)})

    def _log_repetition(self) -> None:
        if self._known_points is not None and self._known_points.facts != self._logged_repetition:
            self._logged_repetition = self._known_points.facts
            self._log_facts(self._logged_repetition)

    def log_dataset(self, record: Mapping[str, Any], *, is_exact: bool = False) -> None:
        """Log a data set, unless its record is known.

        Args:
            record: name, digest, source, context and profile.
            is_exact: whether the digest covers all the data. If not, a different digest alone is ignored, because an
                attempt that resumes in the middle of the data computes another digest of the same data.
        """
        context = record["context"]
        known = self._known_datasets.get(context, {})
        if known.items() >= record.items() or (not is_exact and {**known, "digest": record["digest"]} == record):
            return
        self._known_datasets[context] = dict(record)
        self.journal.append("dataset", record)
        # In its own file, because the journal's first files may be pruned before the next attempt.
        with suppress(OSError):  # on a full disk, the next attempt logs the data set again
            replace_file(self._outbox_dir / _DATASETS, json.dumps(self._known_datasets) + "\n", is_private=True)

    def log_text(self, name: str, content: str) -> None:
        """Log a small text file as an artifact of the run; `name` is a relative path."""
        self.journal.append("text", {"name": self._names.clean("text", name), "content": content})

    def sync(self) -> None:
        """Flush the journal to disk, so that no crash of the machine loses an entry. Any thread."""
        self.journal.sync()

    def log_model_spec(self, values: Mapping[str, Any]) -> None:
        """Set the model spec (see `harness.models.model_spec`) of this attempt's checkpoints. Blocks on fsync."""
        # In its own file, because an input example may have megabytes.
        self._model_spec = write_model_spec(self._outbox_dir, self.attempt, values)
        self.has_model_spec = True

    def log_checkpoint(self, record: Mapping[str, Any]) -> None:
        """Log a committed checkpoint: its directory's name, epoch, step and metrics. Any thread. Blocks on fsync."""
        if self.config.log_models:
            self.journal.append("checkpoint", {**record, "recipe": self._model_spec})
            self.journal.sync()

    def retire_checkpoint(self, record: Mapping[str, Any]) -> None:
        """Log the name and key of a checkpoint that will be removed. Any thread. Blocks on fsync.

        Call this after `log_checkpoint` of its successor and before the removal.
        """
        if self.config.log_models:
            self.journal.append("retire", record)
            self.journal.sync()

    def finish(
        self, status: RunStatus, reason: str, timeout_s: float, keep_waiting: Callable[[Remaining], bool]
    ) -> bool:
        """Log the run's end, wait at most `timeout_s` for the delivery, and return whether everything is delivered.

        Args:
            status: final status in MLflow.
            reason: one line, for the tag ``harness.end_reason``.
            timeout_s: seconds from this call.
            keep_waiting: called twice a second with the undelivered part; False ends the wait.

        Raises:
            TrackingError: if the disk does not accept the journal's end within that time.
        """
        self._append_end(status, reason)
        deadline_s = time.monotonic() + timeout_s
        progress = DeliveryProgress(self.run_dir)

        def may_wait() -> bool:
            return time.monotonic() < deadline_s and keep_waiting(progress.remaining())

        self._close_journal(may_wait)
        return self._wait_until_delivered(may_wait)

    def log_after_finish(
        self, run_name: str, values: Mapping[str, float], step: int, reason: str, timeout_s: float
    ) -> bool:
        """Add metrics to a finished run, finish it again, wait, and return whether everything is delivered.

        Call this instead of `start`, on a tracker that logs nothing else.

        Args:
            run_name: name of the run in MLflow.
            values: metrics.
            step: completed optimizer steps.
            reason: one line, for the tag ``harness.end_reason``.
            timeout_s: limit in seconds of the wait after the start.

        Raises:
            TrackingError: as `start` and `finish`; the entries remain in the journal.
        """
        self.run_id = read_run_record(self.run_dir).get("run_id")
        self._is_after_finish, self._last_step = True, step
        self.log_metrics(values, step)
        # Before the publisher starts: whichever process delivers these metrics also ends the run.
        self._append_end("FINISHED", reason)
        self._close_journal(lambda: False)
        self._start(run_name, _LOCK_TIMEOUT_S)
        deadline_s = time.monotonic() + timeout_s
        return self._wait_until_delivered(lambda: time.monotonic() < deadline_s)

    def _append_end(self, status: RunStatus, reason: str) -> None:
        self._log_repetition()
        self._log_dropped()
        body = {"status": status, "reason": reason, "step": self._last_step}
        # If the run is or was active in the user's process, MLflow ends it there and would overwrite this end.
        self.journal.append("end", body | {"is_held": True} if self._is_user_run or is_active(self.run_id) else body)

    def _close_journal(self, may_wait: Callable[[], bool]) -> None:
        while not self._flush(may_wait=may_wait()):
            time.sleep(0.5)
        self.journal.close()

    def _flush(self, may_wait: bool) -> bool:
        """Flush the journal; False if the disk refuses it and there is time to retry."""
        try:
            self.journal.sync()
            return True
        except TrackingError:
            if not may_wait:
                raise
            return False

    def _wait_until_delivered(self, may_wait: Callable[[], bool]) -> bool:
        if self._publisher is None:
            return not self.config.enabled
        if self.run_id is None:
            # The start has failed, so a new publisher would fail too.
            return False
        self._publisher.wait(may_wait)
        self.detach()
        delivered = read_delivered(self._outbox_dir)
        return delivered.offset == self.journal.end_offset and not delivered.files_trouble

    def detach(self) -> None:
        """Detach the publisher, which then retries for a limited time and exits."""
        if self._publisher is not None:
            self._publisher.detach()


def _read_logged(outbox_dir: Path) -> Logged:
    logged = read_logged(outbox_dir)
    # Earlier versions wrote unchecked names.
    return Logged({clean_key(name): value for name, value in logged.params.items()}, logged.checkpoints)
