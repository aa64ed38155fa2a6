"""The publisher's process, beside rank zero.

    python -m harness.tracking.publisher.process RUN_DIR      (started by the trainer; settings on stdin)

It reads its settings from the first line of standard input, makes or finds the MLflow run, answers with one
line on standard output, and then delivers (`harness.tracking.publisher.publisher`). The end of standard input means
that the trainer is gone.
"""

from __future__ import annotations

import fcntl
import gc
import io
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from harness.errors import TrackingError
from harness.io.lock_file import holder_of, open_lock, write_holder
from harness.io.redact import redact, remember, without_password
from harness.run.directory import read_run_record
from harness.tracking.journal.delivery_state import has_more, read_delivered
from harness.tracking.journal.heartbeat import Heartbeat
from harness.tracking.journal.settings import absolute_sqlite, write_settings
from harness.tracking.journal.writer import DEFAULT_MAX_BYTES
from harness.tracking.mlflow.names import clean_model_name
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import PublisherSettings, RefusedError
from harness.tracking.publisher.launcher import FILES_LEFT
from harness.tracking.publisher.publisher import POLL_S, Publisher, log

# Out of the trainer's way.
_NICE = 10

Answer = Callable[[Mapping[str, Any]], None]


def main(argv: list[str]) -> int:
    """Entry point of the process; 0 if all was delivered."""
    run_dir = Path(argv[0])
    # A cluster that stops a job tells each of its processes. This one ends with the trainer, which has a last
    # checkpoint to write first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    answer = _take_standard_output()
    raw = json.loads(_read_line(sys.stdin.fileno()))
    remember(raw["tracking_uri"])
    if not raw.get("is_awaited"):
        os.nice(_NICE)
    with os.fdopen(open_lock(run_dir / "outbox" / "publisher.lock"), "r+") as lock:
        if not _has_locked(lock, raw["lock_timeout_s"]) and not _has_locked_late(lock, run_dir, raw, answer):
            holder = holder_of(lock.fileno(), "FLOCK")
            answer({"error": f"{run_dir}: another publisher delivers this run already: {holder}; wait for it to end"})
            return 1
        # Who waits for the lock reads it.
        with suppress(OSError):
            write_holder(lock.fileno())
        return _deliver_run(run_dir, raw, answer)


def _take_standard_output() -> Answer:
    """Keep standard output for the answer, and have whatever else prints write into the log.

    MLflow prints a run's address as it ends; once the trainer is gone, that would be an error each time.
    """
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # That address may have a password in it, as has what libraries warn of.
    sys.stdout = sys.stderr = _Redacted(sys.stderr)

    def answer(values: Mapping[str, Any]) -> None:
        # Only the first is read.
        with suppress(BrokenPipeError):  # the trainer is gone, and its outbox is delivered all the same
            os.write(answers, json.dumps(values).encode() + b"\n")

    return answer


class _Redacted(io.TextIOBase):
    """A stream that has no secrets in what is written to it, line by line. Any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._begun = ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._stream.write(redact(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


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


def _has_locked_late(lock: TextIO, run_dir: Path, raw: Mapping[str, Any], answer: Answer) -> bool:
    """Wait on behind the publisher of the attempt before, which has a large checkpoint in hand, say.

    The run has its id already: training goes on meanwhile. The other ends where it comes to this attempt.
    """
    run_id = read_run_record(run_dir).get("run_id")
    if raw["attempt"] == 1 or run_id is None or _standard_input_closed():
        return False
    log(f"waits for the publisher of the attempt before: {holder_of(lock.fileno(), 'FLOCK')}")
    answer({"run_id": run_id})
    while not _has_locked(lock, POLL_S):
        if _standard_input_closed():
            return False
    return True


def _deliver_run(run_dir: Path, raw: dict[str, Any], answer: Answer) -> int:
    delivered = read_delivered(run_dir / "outbox")
    if not has_more(run_dir / "outbox", delivered) and delivered.ended:
        answer({"run_id": read_run_record(run_dir)["run_id"]})
        return 0

    from harness.tracking.mlflow import client
    from harness.tracking.mlflow.store import MlflowStore
    from harness.tracking.mlflow.uploads import Pace

    client.require_json_answers()
    record = read_run_record(run_dir)
    given_run_id, given_by = raw.get("given_run") or (None, None)
    settings = PublisherSettings(
        run_name=raw["run_name"],
        tracking_uri=absolute_sqlite(client.resolve_tracking_uri(raw["tracking_uri"])),
        experiment_name=raw["experiment_name"]
        or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        or record.get("experiment_name")
        or "default",
        registration=_registration(raw),
        start_timeout_s=raw["start_timeout_s"],
        attempt=raw["attempt"],
        parent_run=raw.get("parent_run"),
        max_upload_bytes_per_s=raw.get("max_upload_bytes_per_s"),
        max_outbox_bytes=raw.get("max_outbox_bytes", DEFAULT_MAX_BYTES),
        leaves_open=raw.get("leaves_open", False),
        experiment_id=raw.get("experiment_id"),
        given_run_id=given_run_id,
    )

    def is_permanent(error: Exception) -> bool:
        return isinstance(error, RefusedError) or client.is_permanent(error)

    try:
        settings, notes = where_it_goes_on(settings, record, client.has_run)
        # For `harness sync`, from any directory; without a password.
        kept = {**raw, "tracking_uri": without_password(settings.tracking_uri)}
        write_settings(run_dir / "outbox", kept)
        heartbeat = Heartbeat(run_dir / "outbox")
        heartbeat.beat()
        pace = Pace(settings.max_upload_bytes_per_s)
        store = MlflowStore(settings.tracking_uri, pace=pace, sent=heartbeat.sent)
        publisher = Publisher(run_dir, settings, store, is_permanent, _standard_input_closed, heartbeat=heartbeat)
        publisher.open_run()
        if raw["experiment_name"] and store.experiment_name not in (None, raw["experiment_name"]):
            notes.append(
                f"MLflow run {store.run_id} is in experiment {store.experiment_name!r}, not {raw['experiment_name']!r}"
            )
    except TrackingError as error:
        log(f"no run: {error}")
        answer({"error": str(error)})
        return 1
    except Exception as error:
        log(f"no run: {error}")
        where = without_password(settings.tracking_uri)
        remedy = (
            "start the server or correct the address (`harness train` and own loops can do without: "
            "tracking.enabled: false)"
        )
        if given_run_id is not None and "run_id" not in record:
            message = (
                f"tracking: MLflow run {given_run_id}, named by {given_by}, cannot be used at {where}: "
                f"{root_cause(error)}; name another, or {remedy}"
            )
        else:
            message = f"tracking.tracking_uri: no MLflow run could be made at {where}: {root_cause(error)}; {remedy}"
        answer({"error": message})
        return 1
    answer({"run_id": store.run_id, "notes": [*notes, *publisher.notes]})
    if raw.get("is_awaited"):
        # Until here the trainer has waited, and with it all ranks.
        os.nice(_NICE)
    # Objects of the imports stay for good. Each full collection in a long backlog would search them, for 0.14 s.
    gc.freeze()
    if publisher.run():
        return 0
    return FILES_LEFT if publisher.has_ended else 1


def _registration(raw: Mapping[str, Any]) -> Registration | None:
    if raw["registered_model_name"] is None:
        return None
    # A run of before there were aliases may still have something to deliver.
    aliases, monitor = raw.get("registered_model_aliases", False), raw.get("monitor")
    # A version before this one left the name to MLflow's own refusal.
    name = clean_model_name(raw["registered_model_name"])
    return Registration(name, aliases, monitor, raw.get("mode", "min"))


def where_it_goes_on(
    settings: PublisherSettings, record: Mapping[str, Any], has_run: Callable[[str, str], bool]
) -> tuple[PublisherSettings, list[str]]:
    """The settings for a run that may be in MLflow already, and lines for the user where they are not those asked for.

    A run is in one place: it stays in its experiment and at its server, unless it is found at the address that is
    configured now, because the server has moved, or has another name from here.

    Args:
        settings: as they are configured now.
        record: what ``run.json`` holds.
        has_run: whether the store at an address has a run of an id.

    Raises:
        TrackingError: if the run's own address is only known without its password.
    """
    run_id, address = record.get("run_id"), record.get("tracking_uri")
    if run_id is None or address is None:
        return settings, []
    notes = []
    if settings.given_run_id not in (None, run_id):
        notes.append(
            f"{record['run_name']} resumes in its MLflow run {run_id}, not in {settings.given_run_id}; for that one "
            "give another run_name"
        )
    configured = without_password(settings.tracking_uri)
    if address != configured and not has_run(settings.tracking_uri, run_id):
        if "***" in address:
            raise TrackingError(
                f"tracking.tracking_uri: {record['run_name']} is at {address} and not at {configured}; give its own "
                "address, with the password, or another run_name"
            )
        notes.append(
            f"MLflow run {run_id} goes on at {address}, where it began, not at {configured}; for one there give "
            "another run_name"
        )
        settings = replace(settings, tracking_uri=address)
    is_by_id = settings.experiment_id is not None
    asked = settings.experiment_id if is_by_id else settings.experiment_name
    if asked != record["experiment_id" if is_by_id else "experiment_name"]:
        notes.append(
            f"MLflow run {run_id} stays in experiment {record['experiment_name']!r}, not {asked!r}; "
            "for one there give another run_name"
        )
    if settings.experiment_name != record["experiment_name"]:
        settings = replace(settings, experiment_name=record["experiment_name"])
    return settings, notes


def root_cause(error: BaseException) -> str:
    """What an error began with, as one line: the outer layers of HTTP clients repeat it at length."""
    while (inner := error.__cause__ or error.__context__) is not None and str(inner):
        error = inner
    return redact(" ".join(str(error).split()))[:300]


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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
