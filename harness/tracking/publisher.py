"""The publisher: delivers the outbox to MLflow, in a process of its own beside rank zero.

    python -m harness.tracking.publisher RUN_DIR      (started by the trainer; settings on stdin)

It reads its settings from the first line of standard input, makes or finds the MLflow run, answers
with one line on standard output, and then delivers entry after entry. Where the store is away it
tries again, with growing pauses, as long as the trainer lives. The end of standard input means that
the trainer is gone: what is in the outbox is delivered if the store lets it, and a run whose end
nobody wrote is marked FAILED.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from harness.durable import replace_file
from harness.errors import TrackingError
from harness.redact import redact, without_password
from harness.tracking.outbox import (
    Delivered,
    Entry,
    read_delivered,
    read_entries,
    write_delivered,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

POLL_S = 0.2
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
SYSTEM_METRICS_EVERY_S = 10.0
MAX_POINTS_PER_DELIVERY = 1000
# Once the trainer is gone, how long a store that is away is waited for.
LINGER_S = 20.0


class Store(Protocol):
    """What the publisher needs of a tracking store; `MlflowStore` is one."""

    run_id: str
    experiment_id: str

    def open_run(self, run_key: str, run_name: str, experiment_name: str) -> None:
        """Find or make the run that carries `run_key`."""

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        """Log (key, value, time in ms, step) points."""

    def log_params(self, values: Mapping[str, str]) -> None:
        """Log parameters."""

    def set_tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        """Record an input."""

    def log_text(self, name: str, content: str) -> None:
        """Put a text file among the artifacts."""

    def log_checkpoint(self, record: Mapping[str, Any], directory: Path, registered_model_name: str | None) -> str:
        """Publish a checkpoint; returns the model's id."""
        ...

    def retire_checkpoint(self, key: str, registered_model_name: str | None) -> bool:
        """Take back a checkpoint that was pruned; whether it is gone, as against kept because it is in use."""
        ...

    def end(self, status: str, end_time_ms: int) -> None:
        """Set the final status."""


@dataclass(frozen=True)
class Settings:
    """What the trainer tells the publisher. Times are in seconds."""

    run_name: str
    tracking_uri: str
    experiment_name: str
    log_system_metrics: bool
    registered_model_name: str | None
    start_timeout_s: float


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
                self.store.open_run(record["run_key"], self.settings.run_name, self.settings.experiment_name)
                break
            except Exception as error:
                if self._is_permanent(error) or self._clock() > deadline_s or self._trainer_is_gone():
                    raise
                log(f"cannot open the run yet: {error}")
                self._sleep(FIRST_PAUSE_S)
        record |= {
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
                if not self._deliver_with_retries(group):
                    return False
                ended = group[-1].kind == "end"
            if ended:
                return True
            if self._trainer_is_gone():
                # The end is written before standard input closes; look once more before concluding.
                if next(iter(read_entries(self._outbox_dir, self._delivered.offset)), None) is None:
                    return self._mark_failed("the trainer ended without saying how (killed, or out of memory?)")
                continue
            if monitor is not None and self._clock() >= next_sample_s:
                next_sample_s = self._clock() + SYSTEM_METRICS_EVERY_S
                self._log_system_metrics(monitor.sample())
            self._sleep(POLL_S)

    def _mark_failed(self, reason: str) -> bool:
        now_ms = time.time_ns() // 1_000_000
        body = {"status": "FAILED", "reason": reason}
        return self._deliver_with_retries([Entry("end", now_ms, body, self._delivered.offset)])

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
            if self.store.retire_checkpoint(body["key"], self.settings.registered_model_name):
                return {body["name"]: None}
        elif kind == "end":
            self.store.set_tags({"harness.end_reason": body["reason"]})
            self.store.end(body["status"], group[0].time_ms)
        return {}

    def _publish(self, entry: Entry) -> dict[str, str | None]:
        body = entry.body
        directory = self.run_dir / "checkpoints" / body["name"]
        # Its retirement is written before it goes: one that is gone, or goes while it is read, is known by it.
        if self._is_retired(entry):
            return {}
        if not directory.is_dir():
            raise_refused(f"{directory} is gone; it was removed before it could be published")
        try:
            return {body["name"]: self.store.log_checkpoint(body, directory, self.settings.registered_model_name)}
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
        )
        write_delivered(self._outbox_dir, self._delivered)

    def _log_system_metrics(self, values: dict[str, float]) -> None:
        # Straight to the store: a reading that is lost in an outage is not worth a journal.
        now_ms = time.time_ns() // 1_000_000
        try:
            self.store.log_metrics([(key, value, now_ms, now_ms // 1000) for key, value in values.items()])
        except Exception as error:
            log(f"system metrics not logged: {error}")


class RefusedError(Exception):
    """Something of ours that cannot be delivered, now or later."""


def raise_refused(message: str) -> None:
    """Raise the error that drops an entry, saying why."""
    raise RefusedError(message)


def read_run_record(run_dir: Path) -> dict[str, Any]:
    """What ``run.json`` holds."""
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return record


def absolute_sqlite(uri: str) -> str:
    """A ``sqlite:///`` URI with a relative path as one that holds from any directory."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + "/") or ":memory:" in uri:
        return uri
    return f"{prefix}{Path(uri.removeprefix(prefix)).absolute()}"


def root_cause(error: BaseException) -> str:
    """What an error began with, as one line: the outer layers of HTTP clients repeat it at length."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    return redact(" ".join(str(error).split()))[:300]


def log(message: str) -> None:
    """One line for ``outbox/publisher.log``."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{stamp} {redact(' '.join(message.split()))}", file=sys.stderr, flush=True)


def _points(entry: Entry) -> Iterator[tuple[str, float, int, int]]:
    for key, value in entry.body["values"].items():
        yield key, value, entry.time_ms, entry.body["step"]


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


def _standard_input_closed() -> bool:
    """Whether the trainer's end of the pipe is gone. It writes nothing after the settings."""
    readable, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def _read_line(descriptor: int) -> bytes:
    """One line, byte by byte: a buffered reader would hide the pipe's end from `select`."""
    line = b""
    while (byte := os.read(descriptor, 1)) not in (b"", b"\n"):
        line += byte
    return line


def main(argv: list[str]) -> int:
    """Entry point of the process; 0 if all was delivered."""
    run_dir = Path(argv[0])
    os.nice(10)
    raw = json.loads(_read_line(sys.stdin.fileno()))
    with (run_dir / "outbox" / "publisher.lock").open("w") as lock:
        if not _has_locked(lock, raw["lock_timeout_s"]):
            answer = {"error": f"{run_dir}: another publisher delivers this run already; wait for it to end"}
            print(json.dumps(answer), flush=True)
            return 1
        return _deliver_run(run_dir, raw)


def _has_locked(lock: TextIO, timeout_s: float) -> bool:
    """Take the run for this publisher alone; whether that worked within the time."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)


def _deliver_run(run_dir: Path, raw: dict[str, Any]) -> int:
    delivered = read_delivered(run_dir / "outbox")
    if delivered.ended and next(iter(read_entries(run_dir / "outbox", delivered.offset)), None) is None:
        print(json.dumps({"run_id": read_run_record(run_dir)["run_id"]}), flush=True)
        return 0

    from harness.tracking import mlflow_store

    settings = Settings(
        run_name=raw["run_name"],
        tracking_uri=absolute_sqlite(mlflow_store.resolve_tracking_uri(raw["tracking_uri"])),
        experiment_name=raw["experiment_name"] or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "default",
        log_system_metrics=raw["log_system_metrics"],
        registered_model_name=raw["registered_model_name"],
        start_timeout_s=raw["start_timeout_s"],
    )

    def is_permanent(error: Exception) -> bool:
        return isinstance(error, RefusedError) or mlflow_store.is_permanent(error)

    # For `harness sync`, from any directory; without a password.
    kept = {**raw, "tracking_uri": without_password(settings.tracking_uri)}
    replace_file(run_dir / "outbox" / "settings.json", json.dumps(kept, indent=2) + "\n")
    try:
        store = mlflow_store.MlflowStore(settings.tracking_uri)
        publisher = Publisher(run_dir, settings, store, is_permanent, _standard_input_closed)
        publisher.open_run()
    except Exception as error:
        log(f"no run: {error}")
        where = without_password(settings.tracking_uri)
        answer = {
            "error": f"tracking.tracking_uri: no MLflow run could be made at {where}: {root_cause(error)}; start the "
            "server, correct the address, or train without it with --tracking.enabled false"
        }
        print(json.dumps(answer), flush=True)
        return 1
    print(json.dumps({"run_id": store.run_id}), flush=True)
    return 0 if publisher.run() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
