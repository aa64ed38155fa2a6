"""Deliver checkpoints as models, and texts as artifacts, in a thread of the publisher."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Final

from harness.checkpoint.format.commit import read_manifest
from harness.errors import CheckpointError
from harness.io.redact import redact
from harness.tracking.journal.delivery_state import DeliveryState
from harness.tracking.journal.entries import FILES, Entry, Kind, read_entries
from harness.tracking.mlflow.mlmodel import read_model_spec
from harness.tracking.mlflow.store_protocol import PublisherSettings, RefusedError, Store
from harness.tracking.publisher.progress import Heartbeat, log
from harness.tracking.publisher.retries import LONGEST_PAUSE_S, RetryPolicy

_RETIREMENTS: Final[tuple[Kind, ...]] = ("retire",)
# How long the run's end waits for an unreachable artifact store; longer than any pause between two tries.
_MAX_OUTAGE_S = 2 * LONGEST_PAUSE_S


class ArtifactWorker:
    """Delivers the entries of `FILES` to the artifact store, in order.

    It only delivers entries before the publisher's offset, so a model's run has its parameters. The publisher waits for
    this worker before it delivers a run's end, so a finished run has its models; the wait is limited to
    `_MAX_OUTAGE_S` while the artifact store is unreachable.

    Effects: has a thread, which blocks on the network; leaves ``<outbox_dir>/delivered.json``.
    """

    def __init__(
        self, run_dir: Path, settings: PublisherSettings, store: Store, state: DeliveryState, retries: RetryPolicy
    ) -> None:
        self._run_dir = run_dir
        self._outbox_dir = run_dir / "outbox"
        self._settings = settings
        self._store = store
        self._state = state
        self._retries = retries
        self._error: BaseException | None = None
        self._has_given_up = False
        # Monotonic start time of the store's outage, and its error.
        self._outage: tuple[float, str] | None = None
        # A running try, for example a long upload, is not counted as an outage.
        self._is_trying = False
        self._thread = threading.Thread(target=self._run, name="harness-artifacts", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop the thread after its current delivery."""
        self._state.close()
        self._thread.join()

    def wait_until_delivered(self, offset: int, heartbeat: Heartbeat) -> bool:
        """Wait until all files before a journal offset are delivered; False, with `files_trouble`, if given up.

        Raises:
            BaseException: the error that ended the thread.
        """
        start_s = time.monotonic()
        while not self._state.wait_for(
            lambda delivered: delivered.models_offset >= offset or self._is_over(start_s), timeout_s=1.0
        ):
            heartbeat.beat()
        if self._error is not None:
            raise self._error
        is_delivered = self._state.current.models_offset >= offset
        outage = self._outage
        reason = "" if is_delivered or outage is None else redact(outage[1])
        if reason != self._state.current.files_trouble:
            self._state.update(files_trouble=reason)
        return is_delivered

    def _is_over(self, start_s: float) -> bool:
        if self._has_given_up or self._error is not None:
            return True
        outage = self._outage
        if outage is None or self._is_trying:
            return False
        return time.monotonic() - max(outage[0], start_s) > _MAX_OUTAGE_S

    def _run(self) -> None:
        try:
            while not self._state.is_closed:
                if not self._deliver_passed():
                    self._has_given_up = True
                    break
                self._state.wait_for(lambda delivered: delivered.offset > delivered.models_offset)
        except BaseException as error:
            self._error = error
        finally:
            # Wake the publisher.
            self._state.skip_files(self._state.current.models_offset)

    def _deliver_passed(self) -> bool:
        passed = self._state.current
        # Read only up to the publisher's offset. Otherwise a long backlog would be read after each of its updates.
        for entry in read_entries(self._outbox_dir, passed.models_offset, FILES, end=passed.offset):
            if self._state.is_closed:
                return True
            if not self._deliver_with_retries(entry):
                return False
        self._state.skip_files(max(passed.offset, self._state.current.models_offset))
        return True

    def _deliver_with_retries(self, entry: Entry) -> bool:
        models: dict[str, str | None] = {}
        try:
            if not self._retries.run(
                entry.kind, lambda: models.update(self._try(entry)), lambda: self._state.is_closed
            ):
                return False
        except Exception as error:
            self._outage = None  # the store has responded
            log(f"refused for good: {entry.kind}: {error}")
            self._state.update(models_offset=entry.end_offset, refused=redact(f"{entry.kind}: {error}"))
            return True
        self._state.update(models_offset=entry.end_offset, models=models)
        return True

    def _try(self, entry: Entry) -> dict[str, str | None]:
        self._is_trying = True
        try:
            models = self._deliver(entry)
        except Exception as error:
            since_s = time.monotonic() if self._outage is None else self._outage[0]
            self._outage = (since_s, f"{entry.kind}: {' '.join(str(error).split())[:300]}")
            raise
        finally:
            self._is_trying = False
        self._outage = None
        return models

    def _deliver(self, entry: Entry) -> dict[str, str | None]:
        """Deliver an entry and return checkpoint name -> model id, None for a deleted model."""
        body = entry.body
        if entry.kind == "checkpoint":
            return self._publish(entry)
        if entry.kind == "text":
            self._store.log_text(body["name"], body["content"])
        elif self._store.retire_checkpoint(body["key"], self._settings.registration):
            return {body["name"]: None}
        return {}

    def _publish(self, entry: Entry) -> dict[str, str | None]:
        body = entry.body
        directory = self._run_dir / "checkpoints" / body["name"]
        # The trainer logs a retirement before it removes the files, so a missing checkpoint has one.
        if self._is_retired(entry):
            return {}
        if not directory.is_dir():
            raise RefusedError(f"{directory} is gone; it was removed before it could be published")
        if _read_key(directory) not in (None, body["key"]):
            # A damaged checkpoint was moved, and the run has saved another one under its name.
            raise RefusedError(f"{directory} is another one now; it was replaced before it could be published")
        try:
            model_spec = read_model_spec(self._outbox_dir, body["recipe"]) if body.get("recipe") else None
            model_id = self._store.log_checkpoint(body, directory, self._settings.registration, model_spec)
            if body.get("log_resume_state") == "last" and body["resume_files"]:
                # Only after the new model is complete, so that there is always one to resume from.
                for reason in self._store.drop_resume_state(body["key"]):
                    log(reason)
            return {body["name"]: model_id}
        except Exception as error:
            if not self._is_retired(entry):
                raise
            # Delivering the retirement deletes the incomplete model.
            log(f"{body['name']} was pruned while it was published: {error}")
            return {}

    def _is_retired(self, published: Entry) -> bool:
        rest = read_entries(self._outbox_dir, published.end_offset, _RETIREMENTS)
        return any(entry.body["key"] == published.body["key"] for entry in rest)


def _read_key(checkpoint: Path) -> str | None:
    """Read a checkpoint's key; None if it is unreadable, which the caller accepts."""
    try:
        return read_manifest(checkpoint).key
    except CheckpointError:
        return None
