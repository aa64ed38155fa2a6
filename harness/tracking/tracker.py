"""Rank zero's side of tracking: what happened goes into the outbox; a process of its own delivers it.

The trainer never imports mlflow and never touches the network.
"""

from __future__ import annotations

import json
import os
import subprocess
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
from harness.tracking.journal.heartbeat import DEAD_AFTER_S, silent_for_s
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
from harness.tracking.journal.settings import absolute_sqlite, write_settings
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.given_run import EXPERIMENT_ID, GivenRun, is_held, mark_used
from harness.tracking.mlflow.mlmodel import newest_recipe, write_recipe
from harness.tracking.mlflow.names import Names, clean_key
from harness.tracking.publisher.drain import Drain, Left
from harness.tracking.publisher.launcher import FILES_LEFT, PublisherDiedError, read_answer, start_publisher

# A publisher that an earlier attempt has left needs about so long for what it has in hand.
_LOCK_TIMEOUT_S = 30.0
_REVIVE_EVERY_S = 10.0
# Context -> the data set that the run has there, in the outbox.
_DATASETS = "datasets.json"

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Appends to the outbox, and starts, feeds and ends the publisher.

    Effects: rank zero only; not collective. `start` and `end` block (each has a time limit), all else
    only appends to a file. Leaves ``<run_dir>/outbox/`` and, through the publisher, ``run.json`` and
    ``attempts.json``.

    Args:
        run_dir: the run's directory, which nobody else writes into.
        config: what goes to MLflow.
        attempt: which in a row is this one, from 1.
        monitor: the metric that ranks checkpoints; None: none does.
        mode: whether less of it is better, or more.

    Attributes:
        run_id: of the MLflow run, once there is one.
        given: the MLflow run that a new run is to be; None: one is made. Set before `start`.
        notes: lines for the user, from `start`.
        warnings: lines for the user, from anything that is logged; the caller removes the ones it displays.
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
        self.given: GivenRun | None = None
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._names = Names(self.warnings.append)
        self._trouble: str | None = None
        self._outbox_dir = run_dir / "outbox"
        self.outbox = JournalWriter(self._outbox_dir, config.max_outbox_bytes, self.warnings.append)
        self.run_id: str | None = None
        # How models are built again: the attempt's before, until this one says.
        self._recipe = newest_recipe(self._outbox_dir)
        self._has_recipe = False
        # Before this attempt adds its own.
        self._logged = _read_logged(self._outbox_dir) if attempt > 1 else Logged({}, frozenset())
        self._known_datasets: dict[str, Any] = (read_record(self._outbox_dir / _DATASETS) or {}) if attempt > 1 else {}
        self._known: KnownPoints | None = None
        self._is_after_end = self._is_users = False
        self._told: dict[str, str] = {}
        self._last_step = 0
        self._publisher: subprocess.Popen[bytes] | None = None
        self._settings: dict[str, Any] = {}
        self._started_s = 0.0
        self._started_at_s = 0.0
        self._next_look_s = 0.0

    def start(self, run_name: str, facts: Mapping[str, str]) -> None:
        """Start the publisher and wait until the MLflow run exists and its id is on disk.

        Args:
            run_name: what MLflow shall call it.
            facts: what is to be known of this attempt.

        Raises:
            TrackingError: if the store refuses or does not answer within ``tracking.start_timeout_s``.
        """
        # First of all: a publisher that the attempt before has left leaves the rest to this attempt's own.
        self._tell(facts)
        self._start(run_name, _LOCK_TIMEOUT_S if self.attempt > 1 else 0.0)

    def _start(self, run_name: str, lock_timeout_s: float) -> None:
        if not self.config.enabled:
            return
        settings = {
            "run_name": run_name,
            "tracking_uri": self.config.tracking_uri,
            "experiment_name": self.config.experiment_name,
            "registered_model_name": self._registered_model_name(),
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
            # `mlflow.set_experiment` sets it, too.
            "experiment_id": None if self.config.experiment_name else os.environ.get(EXPERIMENT_ID) or None,
            "given_run": None if self.given is None else [self.given.run_id, self.given.source],
        }
        self._settings = settings
        if self.config.offline:
            self._is_users = self.given is not None and is_held(self.given.run_id)
            mark_used(None if self.given is None else self.given.run_id)
            self._stay_offline(settings)
            return
        limit_s = self.config.start_timeout_s + lock_timeout_s
        for is_last_try in (False, False, True):
            self._started_s, self._started_at_s = time.monotonic(), time.time()
            self._publisher = start_publisher(self.run_dir, {**settings, "is_awaited": True})
            try:
                self.run_id, notes = read_answer(self._publisher, self.run_dir, limit_s)
                self.notes = [*(() if self.given is None else self.given.notes), *notes]
                self._is_users = is_held(self.run_id)
                mark_used(self.run_id)
                break
            except PublisherDiedError:
                self.abandon()
                self._publisher.kill()
                self._publisher.wait()
                if is_last_try:
                    raise
            except BaseException:
                self.abandon()
                with suppress(subprocess.TimeoutExpired):  # it has said no, and ends
                    self._publisher.wait(timeout=5)
                raise

    def _registered_model_name(self) -> str | None:
        given = self.config.registered_model_name
        return None if given is None else self._names.of("registered model", given)

    def _stay_offline(self, settings: Mapping[str, Any]) -> None:
        """Leave for `harness sync` what a publisher would have been told: where to, from any directory."""
        uri = settings["tracking_uri"] or os.environ.get("MLFLOW_TRACKING_URI")
        kept = {
            **settings,
            "tracking_uri": None if uri is None else without_password(absolute_sqlite(uri)),
            "experiment_name": settings["experiment_name"] or os.environ.get("MLFLOW_EXPERIMENT_NAME"),
        }
        write_settings(self.run_dir / "outbox", kept)
        self.notes = [f"offline: nothing goes to MLflow until `harness sync {self.run_dir}`"]

    def _tell(self, facts: Mapping[str, str]) -> None:
        self.outbox.append("attempt", {"number": self.attempt, "facts": dict(facts)})

    def resumed(self, step: int, checkpoint: str | None) -> KnownPoints:
        """The run goes on from a step; returns what is there already from that step on.

        Args:
            step: optimizer steps that are complete.
            checkpoint: what it goes on from; None: from the beginning.
        """
        self._tell({"step_from": str(step)} | ({} if checkpoint is None else {"resumed_from": checkpoint}))
        self._known = KnownPoints(self._outbox_dir, step)
        self._last_step = step
        return self._known

    def params(self, values: Mapping[str, str]) -> Drift:
        """Parameters of the run: name -> text; returns how they are others than an earlier attempt's.

        MLflow refuses to change a parameter: one that has changed is a fact of this attempt. A name that MLflow
        refuses is replaced, with a line in `warnings`; so are those of metrics, tags and texts.
        """
        found = drift(self._logged.params, self._names.of_all("parameter", values))
        if found.added:
            self.outbox.append("params", found.added)
        if found.changed:
            self._tell({"param_drift": found.as_json()})
        return found

    def has_checkpoint(self, key: str) -> bool:
        """Whether an earlier attempt has put this checkpoint into the journal."""
        return key in self._logged.checkpoints

    def points_at(self, metrics: Mapping[str, float], step: int) -> dict[str, Point]:
        """The points in the journal that a checkpoint's metrics are, by their names in MLflow.

        See `continuation.points_at`.
        """
        return points_at(self._outbox_dir, self._names.of_all("metric", metrics), step)

    def metric_name(self, name: str) -> str:
        """What a metric is named in MLflow."""
        return self._names.of("metric", name)

    def tags(self, values: Mapping[str, str]) -> None:
        """Tags of the run: name -> text."""
        self.outbox.append("tags", self._names.of_all("tag", values))

    def metrics(self, values: Mapping[str, float], step: int, *, is_own_step: bool = False) -> dict[str, Point]:
        """Metrics at an optimizer step; returns the points that they are, which may be an earlier attempt's.

        The points are by their names in MLflow.

        Args:
            values: name -> number.
            step: optimizer steps that are complete.
            is_own_step: the step is of a script's own counting, such as of epochs: no optimizer's is meant.
        """
        self._revive()
        values = self._names.of_all("metric", values)
        if self.attempt > 1 and self._known is None and not self._is_after_end:
            # Nothing was restored: it begins again.
            self.resumed(0, None)
        if not is_own_step:
            self._last_step = max(self._last_step, step)
        points: dict[str, Point] = {}
        if self._known is not None:
            points = {key: known for key, value in values.items() if (known := self._known.take(key, value, step))}
            if not is_own_step and step > self._known.last_step:
                self._tell_repeated()
        if new := {key: value for key, value in values.items() if key not in points}:
            body = {"step": step, "values": new}
            time_ms = self.outbox.append("metrics", body | {"is_own_step": True} if is_own_step else body)
            self._look_at_disk()
            points |= {key: Point(value, time_ms, step) for key, value in new.items()}
        # A point is the same one, for a model too, by its time: where that is not known, no model has it.
        return {key: point for key, point in points.items() if point.time_ms != UNKNOWN_TIME_MS}

    def system_metrics(self, values: Mapping[str, float]) -> None:
        """What the machines are busy with, now. Any thread.

        Its step is the second of the clock: attempts follow each other in it, and no training's step is meant.
        """
        self.outbox.append("system", {"step": int(time.time()), "values": values})

    def _look_at_disk(self) -> None:
        """Keep a line for the user where the journal has begun to take no metrics, or takes them again."""
        trouble = self.outbox.trouble
        if (trouble is None) == (self._trouble is None):
            return
        self._trouble = trouble
        if trouble is None:
            self._tell_left_out()
        left_out = self.outbox.num_left_out
        lost = f"{left_out} rows of metrics were left out" if left_out else "nothing was lost"
        self.warnings.append(trouble or f"{self.outbox.path}: takes entries again; {lost}")

    def _tell_left_out(self) -> None:
        if self.outbox.num_left_out:
            self._tell({"metrics_left_out": str(self.outbox.num_left_out)})

    def _tell_repeated(self) -> None:
        """Say what repeating has shown, where that has not been said."""
        if self._known is not None and self._known.facts != self._told:
            self._told = self._known.facts
            self._tell(self._told)

    def _revive(self) -> None:
        """Start the publisher again if it has died, or hangs. Costs a system call, now and then two."""
        if self._publisher is None or (self._publisher.poll() is None and not self._hangs()):
            return
        if time.monotonic() - self._started_s < _REVIVE_EVERY_S:
            return
        self.abandon()
        self._started_s, self._started_at_s = time.monotonic(), time.time()
        # It finds the run by its key. Its answer is not waited for: training goes on meanwhile. Where there is no
        # memory for it now, or no room, it is tried again later.
        with suppress(OSError):
            self._publisher = start_publisher(self.run_dir, self._settings)

    def _hangs(self) -> bool:
        """Whether it has given no sign of life for longer than any request takes; it is killed then.

        What it has in hand is delivered again, and leaves what once would have left.
        """
        assert self._publisher is not None
        if time.monotonic() < self._next_look_s:
            return False
        self._next_look_s = time.monotonic() + _REVIVE_EVERY_S
        if silent_for_s(self._outbox_dir, self._started_at_s) < DEAD_AFTER_S:
            return False
        self._publisher.kill()
        self._publisher.wait()
        return True

    def dataset(self, record: Mapping[str, Any], *, is_exact: bool = False) -> None:
        """A data set: name, digest, source, context and profile.

        Args:
            record: what is known of it.
            is_exact: whether the digest is of all the data. If it is not, an attempt that resumes in the middle of the
                data has another digest of the same ones, and the record of the first attempt stays.
        """
        context = record["context"]
        known = self._known_datasets.get(context, {})
        if known.items() >= record.items() or (not is_exact and {**known, "digest": record["digest"]} == record):
            return
        self._known_datasets[context] = dict(record)
        self.outbox.append("dataset", record)
        # Not from the journal, whose first files may be gone by the next attempt.
        with suppress(OSError):  # the disk is full: the next attempt describes it anew
            replace_file(self._outbox_dir / _DATASETS, json.dumps(self._known_datasets) + "\n", is_private=True)

    def text(self, name: str, content: str) -> None:
        """A small text file among the run's artifacts, at a path within them."""
        self.outbox.append("text", {"name": self._names.of("text", name), "content": content})

    def sync(self) -> None:
        """Wait until the journal is on the disk itself: no crash of the machine takes a point back. Any thread."""
        self.outbox.sync()

    @property
    def has_recipe(self) -> bool:
        """Whether this attempt has said how its models are built again."""
        return self._has_recipe

    def recipe(self, values: Mapping[str, Any]) -> None:
        """How the models of this attempt are built again, see `harness.models.model_spec`.

        It goes with each of the attempt's checkpoints.

        In a file of its own, on disk when this returns: an example of what the model takes may be megabytes.
        """
        self._recipe = write_recipe(self._outbox_dir, self.attempt, values)
        self._has_recipe = True

    def checkpoint(self, record: Mapping[str, Any]) -> None:
        """A committed checkpoint: its directory's name, epoch, step and metrics. Any thread."""
        if self.config.log_models:
            self.outbox.append("checkpoint", {**record, "recipe": self._recipe})
            self.outbox.sync()

    def retire(self, record: Mapping[str, Any]) -> None:
        """A checkpoint, by name and key, that is about to be removed. Any thread.

        On the disk itself when this returns, behind the entry of the checkpoint that takes its place.
        """
        if self.config.log_models:
            self.outbox.append("retire", record)
            self.outbox.sync()

    def end(self, status: RunStatus, reason: str, timeout_s: float, waiting: Callable[[Left], bool]) -> bool:
        """Say how the run ended and wait until all is delivered, at most `timeout_s`.

        Args:
            status: the status that MLflow shall show.
            reason: one line, for the tag ``harness.end_reason``.
            timeout_s: the limit of the wait, in seconds.
            waiting: called twice a second with what is left; whether to wait on.

        Returns:
            Whether everything was delivered.

        Raises:
            TrackingError: if the disk does not take the journal's end within that time.
        """
        self._append_end(status, reason)
        deadline_s = time.monotonic() + timeout_s
        drain = Drain(self.run_dir)

        def may_wait() -> bool:
            return time.monotonic() < deadline_s and waiting(drain.left())

        self._close_journal(may_wait)
        return self._wait_until_delivered(may_wait)

    def add_after_end(
        self, run_name: str, values: Mapping[str, float], step: int, reason: str, timeout_s: float
    ) -> bool:
        """Add metrics to a run whose training is complete, end it again, and wait until all is delivered.

        In place of `start`, of a tracker that logs nothing else.

        Args:
            run_name: what MLflow calls it.
            values: metrics by name, as `metrics` takes them.
            step: optimizer steps that are complete.
            reason: one line, for the tag ``harness.end_reason``.
            timeout_s: the limit of the wait behind the start, in seconds.

        Returns:
            Whether everything was delivered.

        Raises:
            TrackingError: as `start` and `end` do; what is in the journal stays there.
        """
        self.run_id = read_run_record(self.run_dir).get("run_id")
        self._is_after_end, self._last_step = True, step
        self.metrics(values, step)
        # Before the publisher starts: whoever delivers these metrics, now or later, ends the run behind them.
        self._append_end("FINISHED", reason)
        self._close_journal(lambda: False)
        self._start(run_name, _LOCK_TIMEOUT_S)
        deadline_s = time.monotonic() + timeout_s
        return self._wait_until_delivered(lambda: time.monotonic() < deadline_s)

    def _append_end(self, status: RunStatus, reason: str) -> None:
        self._tell_repeated()
        self._tell_left_out()
        body = {"status": status, "reason": reason, "step": self._last_step}
        # Of two that end it, the later one would win: a run that the user's code has active, or had as this began, is
        # ended by MLflow there.
        self.outbox.append("end", body | {"is_held": True} if self._is_users or is_held(self.run_id) else body)

    def _close_journal(self, may_wait: Callable[[], bool]) -> None:
        while not self._is_on_disk(may_wait=may_wait()):
            time.sleep(0.5)
        self.outbox.close()

    def _wait_until_delivered(self, may_wait: Callable[[], bool]) -> bool:
        if self._publisher is None:
            return not self.config.enabled
        if self.run_id is None:
            # The start has failed: there is no run whose end another publisher could deliver, after as long a wait.
            return False
        while self._publisher.poll() not in (0, FILES_LEFT) and may_wait():
            self._revive()
            with suppress(subprocess.TimeoutExpired):
                if self._publisher.wait(timeout=0.5) != 0:
                    time.sleep(0.5)  # until it may be started again
        self.abandon()
        delivered = read_delivered(self.run_dir / "outbox")
        return delivered.offset == self.outbox.end and not delivered.files_trouble

    def _is_on_disk(self, may_wait: bool) -> bool:
        """Whether all of the journal is; where a full disk refuses it and there is no time left, that is an error."""
        try:
            self.outbox.sync()
            return True
        except TrackingError:
            if not may_wait:
                raise
            return False

    def abandon(self) -> None:
        """Let go of the publisher: it delivers what it can for a while, and then ends by itself."""
        if self._publisher is not None:
            for stream in (self._publisher.stdin, self._publisher.stdout):
                if stream is not None:
                    stream.close()


def _read_logged(outbox_dir: Path) -> Logged:
    """What earlier attempts have logged; a version before this one wrote names as they were given."""
    logged = read_logged(outbox_dir)
    return Logged({clean_key(name): value for name, value in logged.params.items()}, logged.checkpoints)
