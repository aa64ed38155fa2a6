"""The publisher's lane of files: checkpoints become models, and texts artifacts, while metrics go on beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from harness.checkpoint.format.commit import read_manifest
from harness.errors import CheckpointError
from harness.io.redact import redact
from harness.tracking.journal.delivery_state import DeliveryState
from harness.tracking.journal.entries import FILES, Entry, Kind, read_entries
from harness.tracking.mlflow.mlmodel import read_recipe
from harness.tracking.mlflow.store_protocol import PublisherSettings, RefusedError, Store
from harness.tracking.publisher.retries import LONGEST_PAUSE_S, Retries

_RETIREMENTS: Final[tuple[Kind, ...]] = ("retire",)
# An end waits for the files as long as they arrive, and for so long where the artifact store takes none: longer than
# the longest pause between two tries, so that a store that is back is noticed.
_MAX_TROUBLE_S = 2 * LONGEST_PAUSE_S


class ArtifactWorker:
    """Delivers what goes to the artifact store, in order, and only what the lane of records has passed.

    So a model finds the run's parameters there, and a run that ends has its models: the other lane waits for this
    one before it delivers an end. Where the artifact store takes nothing, it waits for `_MAX_TROUBLE_S`.

    Effects: not collective; a thread of the publisher's own; blocks on the network; leaves what `DeliveryState` does.

    Args:
        run_dir: the run's directory.
        settings: see `PublisherSettings`.
        store: where to.
        acknowledged: how far both lanes are.
        retries: how a store that is away is waited for.
        log: takes a line.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: PublisherSettings,
        store: Store,
        acknowledged: DeliveryState,
        retries: Retries,
        log: Callable[[str], None],
    ) -> None:
        self._run_dir = run_dir
        self._outbox_dir = run_dir / "outbox"
        self._settings = settings
        self._store = store
        self._acknowledged = acknowledged
        self._retries = retries
        self._log = log
        self._error: BaseException | None = None
        self._has_given_up = False
        # Since when the store takes nothing, by the monotonic clock, and why.
        self._trouble: tuple[float, str] | None = None
        # Whether a try is running: a large file is on its way, say, that failed before.
        self._is_trying = False
        self._thread = threading.Thread(target=self._run, name="harness-models", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End, once what is in hand is done."""
        self._acknowledged.close()
        self._thread.join()

    def wait_until_passed(self, offset: int, beat: Callable[[], None]) -> bool:
        """Wait until all up to an offset is delivered.

        Returns:
            Whether it is. If not, the store takes no files: the reason is in `Delivered.files_trouble`.
        """
        start_s = time.monotonic()
        while not self._acknowledged.wait(
            lambda now: now.models_offset >= offset or self._is_over(start_s), timeout_s=1.0
        ):
            beat()
        if self._error is not None:
            raise self._error
        has_passed = self._acknowledged.now.models_offset >= offset
        trouble = self._trouble
        reason = "" if has_passed or trouble is None else redact(trouble[1])
        if reason != self._acknowledged.now.files_trouble:
            self._acknowledged.update(files_trouble=reason)
        return has_passed

    def _is_over(self, start_s: float) -> bool:
        if self._has_given_up or self._error is not None:
            return True
        trouble = self._trouble
        if trouble is None or self._is_trying:
            return False
        return time.monotonic() - max(trouble[0], start_s) > _MAX_TROUBLE_S

    def _run(self) -> None:
        try:
            while not self._acknowledged.is_closed:
                if not self._deliver_passed():
                    self._has_given_up = True
                    break
                self._acknowledged.wait(lambda now: now.offset > now.models_offset)
        except BaseException as error:
            self._error = error
        finally:
            # Who waits for this lane looks again.
            self._acknowledged.pass_models(self._acknowledged.now.models_offset)

    def _deliver_passed(self) -> bool:
        passed = self._acknowledged.now
        # No further: the other lane reads what is behind, and a long backlog would be read again for each of its steps.
        for entry in read_entries(self._outbox_dir, passed.models_offset, FILES, end=passed.offset):
            if self._acknowledged.is_closed:
                return True
            if not self._deliver_with_retries(entry):
                return False
        self._acknowledged.pass_models(max(passed.offset, self._acknowledged.now.models_offset))
        return True

    def _deliver_with_retries(self, entry: Entry) -> bool:
        models: dict[str, str | None] = {}
        try:
            if not self._retries.until_done(
                entry.kind, lambda: models.update(self._try(entry)), lambda: self._acknowledged.is_closed
            ):
                return False
        except Exception as error:
            self._trouble = None  # the store has answered
            self._log(f"refused for good: {entry.kind}: {error}")
            self._acknowledged.update(models_offset=entry.end_offset, refused=redact(f"{entry.kind}: {error}"))
            return True
        self._acknowledged.update(models_offset=entry.end_offset, models=models)
        return True

    def _try(self, entry: Entry) -> dict[str, str | None]:
        self._is_trying = True
        try:
            models = self._deliver(entry)
        except Exception as error:
            since_s = time.monotonic() if self._trouble is None else self._trouble[0]
            self._trouble = (since_s, f"{entry.kind}: {' '.join(str(error).split())[:300]}")
            raise
        finally:
            self._is_trying = False
        self._trouble = None
        return models

    def _deliver(self, entry: Entry) -> dict[str, str | None]:
        """Returns checkpoint name -> id of its model, None where there is none any more."""
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
            model_id = self._store.log_checkpoint(body, directory, self._settings.registration, recipe)
            if body.get("log_resume_state") == "last" and body["resume_files"]:
                # Only now that this one is whole: at any moment there is one to go on from.
                for reason in self._store.drop_resume_state(body["key"]):
                    self._log(reason)
            return {body["name"]: model_id}
        except Exception as error:
            if not self._is_retired(entry):
                raise
            # What there is of its model goes when its retirement is delivered.
            self._log(f"{body['name']} was pruned while it was published: {error}")
            return {}

    def _is_retired(self, published: Entry) -> bool:
        rest = read_entries(self._outbox_dir, published.end_offset, _RETIREMENTS)
        return any(entry.body["key"] == published.body["key"] for entry in rest)


def _key_of(checkpoint: Path) -> str | None:
    """Which checkpoint it is; None: it does not tell, and is taken for the one that was meant."""
    try:
        return read_manifest(checkpoint).key
    except CheckpointError:
        return None
