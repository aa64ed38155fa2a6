"""The publisher: delivers the outbox to a tracking store, entry after entry.

Where the store is away it tries again, with growing pauses, as long as the trainer lives. Once the trainer
is gone, what is in the outbox is delivered if the store lets it, and an attempt whose end nobody wrote is
marked FAILED. `harness.tracking.publisher_process` is the process that this runs in.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from harness.checkpoint.commit import read_manifest
from harness.durable import replace_file
from harness.errors import CheckpointError, TrackingError
from harness.redact import redact, without_password
from harness.run_directory import read_run_record
from harness.tracking import attempts
from harness.tracking.mlmodel import read_recipe
from harness.tracking.outbox import (
    Delivered,
    Entry,
    read_delivered,
    read_entries,
    write_delivered,
)
from harness.tracking.store import RefusedError, Settings, Store

POLL_S = 0.2
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SYSTEM_METRICS_EVERY_S = 10.0
MAX_POINTS_PER_DELIVERY = 1000
# Once the trainer is gone, how long a store that is away is waited for.
LINGER_S = 20.0


def _key_of(checkpoint: Path) -> str | None:
    """Which checkpoint it is; None: it does not tell, and is taken for the one that was meant."""
    try:
        return read_manifest(checkpoint).key
    except CheckpointError:
        return None


class Publisher:
    """Delivers one run directory's outbox to one store.

    Args:
        run_dir: the run's directory.
        settings: see `Settings`.
        store: where to.
        is_permanent: whether an error of the store means no for good.
        trainer_is_gone: asked between deliveries.
        sleep: how to pause, in seconds.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Settings,
        store: Store,
        is_permanent: Callable[[Exception], bool],
        trainer_is_gone: Callable[[], bool],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_dir = run_dir
        self.settings = settings
        self.store = store
        self._outbox_dir = run_dir / "outbox"
        self._is_permanent = is_permanent
        self._trainer_is_gone = trainer_is_gone
        self._sleep = sleep
        self._clock = clock
        self._delivered = read_delivered(self._outbox_dir)
        self._attempts = attempts.read_attempts(run_dir)
        self._has_seen_trainer = False
        self._gone_since_s: float | None = None

    def open_run(self) -> None:
        """Make or find the MLflow run and put its id on disk, trying for ``start_timeout_s``.

        Raises:
            Exception: the store's own, from the last try.
        """
        # The directory's name and a number drawn once name this run for good: after a crash between
        # making the run and writing its id, the next attempt finds it instead of making a second.
        record = read_run_record(self.run_dir)
        deadline_s = self._clock() + self.settings.start_timeout_s
        while True:
            try:
                self.store.open_run(
                    record["run_key"], self.settings.run_name, self.settings.experiment_name, record.get("run_id")
                )
                break
            except Exception as error:
                if self._is_permanent(error) or self._clock() > deadline_s or self._trainer_is_gone():
                    raise
                log(f"cannot open the run yet: {error}")
                self._sleep(FIRST_PAUSE_S)
        # Read again: the next attempt may have written its number meanwhile.
        record = read_run_record(self.run_dir) | {
            "run_id": self.store.run_id,
            "experiment_id": self.store.experiment_id,
            "experiment_name": self.settings.experiment_name,
            "tracking_uri": without_password(self.settings.tracking_uri),
        }
        replace_file(self.run_dir / "run.json", json.dumps(record, indent=2) + "\n")

    def run(self) -> bool:
        """Deliver until the run's end is delivered; whether it was."""
        try:
            return self._run()
        except TrackingError as error:
            # What is behind a damaged entry cannot be trusted: the run must not look complete.
            log(str(error))
            self._mark_failed(str(error))
            return False

    def _run(self) -> bool:
        next_sample_s = self._clock()
        monitor = _system_monitor() if self.settings.log_system_metrics else None
        while True:
            ended = False
            for group in _grouped(read_entries(self._outbox_dir, self._delivered.offset)):
                if group[0].kind == "attempt" and group[0].body["number"] > self.settings.attempt:
                    log(f"attempt {group[0].body['number']} has begun; the rest is its own publisher's")
                    return False
                if not self._deliver_with_retries(group):
                    return False
                ended = group[-1].kind == "end"
            if ended:
                return True
            if self._trainer_is_gone():
                # The end is written before standard input closes; look once more before concluding.
                if next(iter(read_entries(self._outbox_dir, self._delivered.offset)), None) is None:
                    return self._mark_failed(attempts.KILLED_REASON)
                continue
            self._has_seen_trainer = True
            if monitor is not None and self._clock() >= next_sample_s:
                next_sample_s = self._clock() + SYSTEM_METRICS_EVERY_S
                self._log_system_metrics(monitor.sample())
            self._sleep(POLL_S)

    def _mark_failed(self, reason: str) -> bool:
        # One that was never seen alive, as by `harness sync`, has been dead for any time.
        was_there = self._has_seen_trainer or not self._delivered.time_ms
        time_ms = time.time_ns() // 1_000_000 if was_there else self._delivered.time_ms
        body = {"status": "FAILED", "reason": reason}
        return self._deliver_with_retries([Entry("end", time_ms, body, self._delivered.offset)])

    def _deliver_with_retries(self, group: list[Entry]) -> bool:
        """Deliver entries as one, trying until it works; False if given up, with nothing forgotten."""
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                models = self._deliver(group)
                self._acknowledge(group, models)
                return True
            except Exception as error:
                if self._is_permanent(error) and len(group) > 1:
                    # One of them is refused, not all: the others must not go with it.
                    return all(self._deliver_with_retries([entry]) for entry in group)
                if self._is_permanent(error):
                    log(f"refused for good: {group[0].kind}: {error}")
                    self._acknowledge(group, {}, refused=redact(f"{group[0].kind}: {error}"))
                    return True
                log(f"cannot deliver yet: {group[0].kind}: {error}")
                if self._has_lingered():
                    return False
                # Full jitter: many jobs that lost one server shall not come back in step.
                self._sleep(random.uniform(0.5, 1.0) * pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _has_lingered(self) -> bool:
        if not self._trainer_is_gone():
            return False
        now_s = self._clock()
        if self._gone_since_s is None:
            self._gone_since_s = now_s
        return now_s - self._gone_since_s > LINGER_S

    def _deliver(self, group: list[Entry]) -> dict[str, str | None]:
        """Returns checkpoint name -> id of its model, None where there is none any more."""
        kind, body = group[0].kind, group[0].body
        if kind == "metrics":
            self.store.log_metrics([point for entry in group for point in _points(entry)])
        elif kind == "params":
            self.store.log_params(body)
        elif kind == "tags":
            self.store.set_tags(body)
        elif kind == "dataset":
            self.store.log_dataset(body)
        elif kind == "text":
            self.store.log_text(body["name"], body["content"])
        elif kind == "checkpoint":
            return self._publish(group[0])
        elif kind == "retire":
            if self.store.retire_checkpoint(body["key"], self.settings.registration):
                return {body["name"]: None}
        elif kind == "attempt":
            self._deliver_attempt(group[0])
        elif kind == "end":
            self._deliver_end(group[0])
        return {}

    def _deliver_attempt(self, entry: Entry) -> None:
        number, delivered = entry.body["number"], self._delivered
        if number > 1 and number not in self._attempts:
            self.store.reopen()
        self._put_attempts(
            attempts.begun(
                self._attempts, number, entry.body["facts"], entry.time_ms, delivered.time_ms, delivered.step
            )
        )

    def _deliver_end(self, entry: Entry) -> None:
        status, reason = entry.body["status"], entry.body["reason"]
        self.store.set_tags({"harness.end_reason": reason})
        self.store.end(status, entry.time_ms)
        step = entry.body.get("step", self._delivered.step)
        self._put_attempts(attempts.ended(self._attempts, status, reason, entry.time_ms, step))

    def _put_attempts(self, records: attempts.Records) -> None:
        if not (tags := attempts.changed_tags(self._attempts, records)):
            return
        self.store.set_tags(tags)
        attempts.write_attempts(self.run_dir, records)
        self._attempts = records
        try:
            self.store.log_text(attempts.FILE, attempts.as_text(records))
        except Exception as error:
            # The tags say the same: an artifact store that is away must not hold up the run's end.
            log(f"{attempts.FILE} not logged: {error}")

    def _publish(self, entry: Entry) -> dict[str, str | None]:
        body = entry.body
        directory = self.run_dir / "checkpoints" / body["name"]
        # Its retirement is written before it goes: one that is gone, or goes while it is read, is known by it.
        if self._is_retired(entry):
            return {}
        if not directory.is_dir():
            raise RefusedError(f"{directory} is gone; it was removed before it could be published")
        if _key_of(directory) not in (None, body["key"]):
            # A damaged one was set aside, and the run has saved under its name again.
            raise RefusedError(f"{directory} is another one now; it was replaced before it could be published")
        try:
            recipe = read_recipe(self._outbox_dir, body["recipe"]) if body.get("recipe") else None
            model_id = self.store.log_checkpoint(body, directory, self.settings.registration, recipe)
            if body.get("log_resume_state") == "last" and body["resume_files"]:
                # Only now that this one is whole: at any moment there is one to go on from.
                for reason in self.store.drop_resume_state(body["key"]):
                    log(reason)
            return {body["name"]: model_id}
        except Exception as error:
            if not self._is_retired(entry):
                raise
            # What there is of its model goes when its retirement is delivered.
            log(f"{body['name']} was pruned while it was published: {error}")
            return {}

    def _is_retired(self, published: Entry) -> bool:
        rest = read_entries(self._outbox_dir, published.end_offset)
        return any(entry.kind == "retire" and entry.body["key"] == published.body["key"] for entry in rest)

    def _acknowledge(self, group: list[Entry], models: Mapping[str, str | None], refused: str | None = None) -> None:
        known = {**self._delivered.models, **models}
        self._delivered = Delivered(
            offset=group[-1].end_offset,
            models={name: model_id for name, model_id in known.items() if model_id is not None},
            refused=(*self._delivered.refused, refused) if refused else self._delivered.refused,
            ended=group[-1].kind == "end",
            time_ms=group[-1].time_ms,
            step=_last_step(self._delivered.step, group),
        )
        write_delivered(self._outbox_dir, self._delivered)

    def _log_system_metrics(self, values: dict[str, float]) -> None:
        # Straight to the store: a reading that is lost in an outage is not worth a journal.
        now_ms = time.time_ns() // 1_000_000
        try:
            self.store.log_metrics([(key, value, now_ms, now_ms // 1000) for key, value in values.items()])
        except Exception as error:
            log(f"system metrics not logged: {error}")


def log(message: str) -> None:
    """One line for ``outbox/publisher.log``."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    sys.stderr.write(f"{stamp} {redact(' '.join(message.split()))}\n")
    sys.stderr.flush()


def _points(entry: Entry) -> Iterator[tuple[str, float, int, int]]:
    for key, value in entry.body["values"].items():
        yield key, value, entry.time_ms, entry.body["step"]


def _last_step(step: int, group: list[Entry]) -> int:
    """How far the running attempt is known to have come, after these entries."""
    for entry in group:
        if entry.kind == "attempt":
            step = int(entry.body["facts"].get("step_from", 0))
        elif entry.kind in ("metrics", "checkpoint"):
            step = max(step, entry.body.get("step", 0))
    return step


def _grouped(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    """Metrics that follow each other as one group, up to a request's limit; all else alone."""
    group: list[Entry] = []
    num_points = 0
    for entry in entries:
        is_metrics = entry.kind == "metrics"
        size = len(entry.body["values"]) if is_metrics else 0
        if group and (not is_metrics or num_points + size > MAX_POINTS_PER_DELIVERY):
            yield group
            group, num_points = [], 0
        if is_metrics:
            group.append(entry)
            num_points += size
        else:
            yield [entry]
    if group:
        yield group


def _system_monitor() -> Any:
    from harness.tracking.mlflow_store import SystemMonitor

    return SystemMonitor()
