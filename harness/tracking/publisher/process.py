"""Run the publisher's process, which the trainer starts.

    python -m harness.tracking.publisher.process RUN_DIR

It reads its settings from the first line of standard input, opens the MLflow run, responds with one line on standard
output, and delivers the journal. The end of standard input means that the trainer has exited.
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
from harness.io.redact import redact, remember, root_cause, without_password
from harness.run.directory import read_run_record
from harness.tracking.journal.delivery_state import has_undelivered, read_delivered
from harness.tracking.journal.writer import DEFAULT_MAX_BYTES
from harness.tracking.mlflow.given_run import absolute_sqlite
from harness.tracking.mlflow.names import clean_model_name
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import PublisherSettings
from harness.tracking.publisher.launcher import FILES_LEFT, write_settings
from harness.tracking.publisher.progress import Heartbeat, log
from harness.tracking.publisher.publisher import POLL_S, Publisher

_NICE = 10


def main(argv: list[str]) -> int:
    """Run the process; return 0 if everything is delivered, `FILES_LEFT` if only files are missing, else 1."""
    run_dir = Path(argv[0])
    # A cluster signals all processes of a job that it stops. The publisher must outlive the trainer, which first saves
    # a last checkpoint.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    pipe = TrainerPipe()
    raw = pipe.read_settings()
    remember(raw["tracking_uri"])
    if not raw.get("is_awaited"):
        os.nice(_NICE)
    with os.fdopen(open_lock(run_dir / "outbox" / "publisher.lock"), "r+") as lock:
        if not _acquire(lock, raw["lock_timeout_s"]) and not _acquire_after_predecessor(lock, run_dir, raw, pipe):
            holder = holder_of(lock.fileno(), "FLOCK")
            pipe.respond(error=f"{run_dir}: another publisher delivers this run already: {holder}; wait for it to end")
            return 1
        # For the messages of a process that waits for the lock.
        with suppress(OSError):
            write_holder(lock.fileno())
        return _deliver_run(run_dir, raw, pipe)


class TrainerPipe:
    """Communicates with the trainer: settings on standard input, one response on standard output.

    Effects: redirects all other output to the log, redacted. MLflow prints a run's address, which may contain a
    password, and would fail after the trainer's exit.
    """

    def __init__(self) -> None:
        self._responses = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        sys.stdout = sys.stderr = _Redacted(sys.stderr)

    def read_settings(self) -> dict[str, Any]:
        """Read the settings from the first line."""
        # Byte by byte, because a buffered reader would hide the pipe's end from `select`.
        line = b""
        while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
            line += byte
        settings: dict[str, Any] = json.loads(line)
        return settings

    def respond(self, **values: Any) -> None:
        """Send a response. The trainer reads only the first one."""
        with suppress(BrokenPipeError):  # the trainer has exited; its outbox is still delivered
            os.write(self._responses, json.dumps(values).encode() + b"\n")

    def has_exited(self) -> bool:
        """Whether the trainer has closed its end of the pipe, to which it writes only the settings."""
        readable, _, _ = select.select([sys.stdin], [], [], 0)
        return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


class _Redacted(io.TextIOBase):
    """A stream that redacts secrets in each line. Any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._incomplete = ""

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._incomplete = (self._incomplete + text).split("\n")
            for line in lines:
                self._stream.write(redact(line) + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()


def _acquire(lock: TextIO, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(POLL_S)


def _acquire_after_predecessor(lock: TextIO, run_dir: Path, raw: Mapping[str, Any], pipe: TrainerPipe) -> bool:
    """Wait for the previous attempt's publisher, which exits when it reaches this attempt's entries.

    It may be uploading a large checkpoint. The MLflow run exists, so the trainer gets its id and does not wait.
    """
    run_id = read_run_record(run_dir).get("run_id")
    if raw["attempt"] == 1 or run_id is None or pipe.has_exited():
        return False
    log(f"waits for the previous attempt's publisher: {holder_of(lock.fileno(), 'FLOCK')}")
    pipe.respond(run_id=run_id)
    while not _acquire(lock, POLL_S):
        if pipe.has_exited():
            return False
    return True


def _deliver_run(run_dir: Path, raw: dict[str, Any], pipe: TrainerPipe) -> int:
    record = read_run_record(run_dir)
    delivered = read_delivered(run_dir / "outbox")
    if not has_undelivered(run_dir / "outbox", delivered) and delivered.ended:
        pipe.respond(run_id=record["run_id"])
        return 0

    # Imported here, because it takes seconds.
    from harness.tracking.mlflow import client
    from harness.tracking.mlflow.store import MlflowStore
    from harness.tracking.mlflow.uploads import UploadMeter

    client.require_json_responses()
    settings = _settings_of(raw, record, absolute_sqlite(client.resolve_tracking_uri(raw["tracking_uri"])))
    try:
        settings, notes = locate_run(settings, record, client.has_run)
        # For `harness sync`, from any directory.
        write_settings(run_dir / "outbox", {**raw, "tracking_uri": without_password(settings.tracking_uri)})
        heartbeat = Heartbeat(run_dir / "outbox")
        heartbeat.beat()
        store = MlflowStore(settings.tracking_uri, meter=UploadMeter(settings.max_upload_bytes_per_s, heartbeat))
        publisher = Publisher(run_dir, settings, store, pipe, heartbeat)
        publisher.open_run()
    except Exception as error:
        log(f"no run: {error}")
        pipe.respond(
            error=str(error) if isinstance(error, TrackingError) else _open_error(error, settings, raw, record)
        )
        return 1
    if raw["experiment_name"] and store.experiment_name not in (None, raw["experiment_name"]):
        notes.append(
            f"MLflow run {store.run_id} is in experiment {store.experiment_name!r}, not {raw['experiment_name']!r}"
        )
    pipe.respond(run_id=store.run_id, notes=[*notes, *publisher.notes])
    if raw.get("is_awaited"):
        # Only now, because all ranks wait for the response.
        os.nice(_NICE)
    # Exclude the imports' permanent objects from full collections, which would take 0.14 s during a long backlog.
    gc.freeze()
    if publisher.run():
        return 0
    return FILES_LEFT if publisher.has_ended else 1


def _settings_of(raw: Mapping[str, Any], record: Mapping[str, Any], tracking_uri: str) -> PublisherSettings:
    """Complete the trainer's settings. Settings of earlier versions lack some keys."""
    registration = None
    if raw["registered_model_name"] is not None:
        registration = Registration(
            clean_model_name(raw["registered_model_name"]),
            raw.get("registered_model_aliases", False),
            raw.get("monitor"),
            raw.get("mode", "min"),
        )
    return PublisherSettings(
        run_name=raw["run_name"],
        tracking_uri=tracking_uri,
        experiment_name=raw["experiment_name"]
        or os.environ.get("MLFLOW_EXPERIMENT_NAME")
        or record.get("experiment_name")
        or "default",
        registration=registration,
        start_timeout_s=raw["start_timeout_s"],
        attempt=raw["attempt"],
        parent_run=raw.get("parent_run"),
        max_upload_bytes_per_s=raw.get("max_upload_bytes_per_s"),
        max_outbox_bytes=raw.get("max_outbox_bytes", DEFAULT_MAX_BYTES),
        leaves_open=raw.get("leaves_open", False),
        experiment_id=raw.get("experiment_id"),
        given_run_id=(raw.get("given_run") or (None, None))[0],
    )


def _open_error(
    error: Exception, settings: PublisherSettings, raw: Mapping[str, Any], record: Mapping[str, Any]
) -> str:
    where = without_password(settings.tracking_uri)
    remedy = (
        "start the server or correct the address (`harness train` and own loops can do without: "
        "tracking.enabled: false)"
    )
    if settings.given_run_id is not None and "run_id" not in record:
        _, source = raw["given_run"]
        return (
            f"tracking: MLflow run {settings.given_run_id}, named by {source}, cannot be used at {where}: "
            f"{root_cause(error)}; name another, or {remedy}"
        )
    return f"tracking.tracking_uri: no MLflow run could be made at {where}: {root_cause(error)}; {remedy}"


def locate_run(
    settings: PublisherSettings, record: Mapping[str, Any], has_run: Callable[[str, str], bool]
) -> tuple[PublisherSettings, list[str]]:
    """Correct the settings of a run that MLflow already has; also return messages for the user about each difference.

    A run remains in its experiment and at its address (in `record`, the content of ``run.json``), unless the configured
    address has it too, for example because the server was moved. `has_run` checks an address for a run id.

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
            f"MLflow run {run_id} continues at {address}, where it began, not at {configured}; for one there give "
            "another run_name"
        )
        settings = replace(settings, tracking_uri=address)
    is_by_id = settings.experiment_id is not None
    requested = settings.experiment_id if is_by_id else settings.experiment_name
    if requested != record["experiment_id" if is_by_id else "experiment_name"]:
        notes.append(
            f"MLflow run {run_id} stays in experiment {record['experiment_name']!r}, not {requested!r}; "
            "for one there give another run_name"
        )
    if settings.experiment_name != record["experiment_name"]:
        settings = replace(settings, experiment_name=record["experiment_name"])
    return settings, notes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
