"""Record on disk how much of the journal the publisher and its artifact worker have delivered."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.io.durable_files import parse_record, replace_file
from harness.tracking.journal.entries import FILES, has_entries, is_entry_end

DELIVERED = "delivered.json"
# Holds the bytes of damaged journal entries.
DAMAGED_ENTRIES = "damaged_entries.jsonl"
MAX_REFUSED_KEPT = 20
# Minimum interval between writes after batches of points, because a write costs two fsyncs.
_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class Delivered:
    """How much of the journal is delivered.

    Args:
        offset: journal offset up to which all entries except those of `FILES` are delivered.
        models_offset: journal offset up to which the entries of `FILES` are delivered.
        models: checkpoint name -> id of its LoggedModel.
        refused: the first `MAX_REFUSED_KEPT` messages about permanent refusals; `num_refused` counts all of them.
        num_damaged: number of damaged journal entries, which are not delivered.
        files_trouble: the artifact store's error, if the run has ended without its files; else empty.
        ended: whether the last delivered entry is the run's end.
        time_ms: time of the last delivered entry, in milliseconds since the epoch.
        step: last delivered step of the current attempt.
    """

    offset: int = 0
    models: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    ended: bool = False
    time_ms: int = 0
    step: int = 0
    models_offset: int = 0
    num_refused: int = 0
    files_trouble: str = ""
    num_damaged: int = 0


def read_delivered(directory: Path) -> Delivered:
    """Read the record; if it is unreadable or does not fit the journal, nothing counts as delivered."""
    delivered = parse_record(directory / DELIVERED, _parse) or Delivered()
    if not is_entry_end(directory, delivered.offset, delivered.time_ms or None):
        return replace(delivered, offset=0, models_offset=0, ended=False, refused=(), num_refused=0, num_damaged=0)
    if not is_entry_end(directory, delivered.models_offset):
        return replace(delivered, models_offset=0)
    return delivered


def has_undelivered(directory: Path, delivered: Delivered) -> bool:
    """Whether the journal has entries that are not delivered."""
    # `models_offset` may be smaller than `offset` although there is no entry of `FILES` in between.
    return has_entries(directory, delivered.offset) or has_entries(directory, delivered.models_offset, FILES)


def delivered_problem(directory: Path) -> str | None:
    """Return a message for the user if the record is damaged or does not fit the journal, else None."""
    path = directory / DELIVERED
    if not path.exists():
        return None
    written = parse_record(path, _parse)
    if written is None:
        return f"{path}: is damaged; the whole journal is delivered again, which changes nothing in MLflow"
    if read_delivered(directory).offset != written.offset:
        return f"{path}: does not fit the journal, which was removed or changed; all of it is delivered"
    return None


def _parse(record: dict[str, Any]) -> Delivered:
    offset, refused = int(record["offset"]), tuple(record["refused"])
    return Delivered(
        offset,
        dict(record["models"]),
        refused,
        bool(record["ended"]),
        int(record.get("time_ms", 0)),
        int(record.get("step", 0)),
        # Earlier versions delivered files in the same thread.
        min(offset, int(record.get("models_offset", offset))),
        int(record.get("num_refused", len(refused))),
        str(record.get("files_trouble", "")),
        int(record.get("num_damaged", 0)),
    )


def write_delivered(directory: Path, delivered: Delivered) -> None:
    """Replace the record atomically."""
    record = {**asdict(delivered), "models": dict(delivered.models)}
    # Private, because the store's errors name hosts.
    replace_file(directory / DELIVERED, json.dumps(record), is_private=True)


class DeliveryState:
    """The publisher's record of what is delivered, shared by its threads.

    Effects: any thread; `update`, `flush` and `close` block on fsync; leaves ``<outbox_dir>/delivered.json``.
    """

    def __init__(self, outbox_dir: Path) -> None:
        self._outbox_dir = outbox_dir
        self._changed = threading.Condition()
        self._delivered = read_delivered(outbox_dir)
        self._is_written = True
        self._next_write_s = 0.0
        self._is_closed = False

    @property
    def current(self) -> Delivered:
        """The record at this moment."""
        with self._changed:
            return self._delivered

    def update(
        self,
        *,
        models: dict[str, str | None] | None = None,
        refused: str | None = None,
        is_points: bool = False,
        **fields: Any,
    ) -> None:
        """Change the record and write it, unless the disk is full.

        Args:
            models: checkpoint name -> id of its model, None if the model is deleted.
            refused: message about one permanent refusal.
            is_points: whether only points were delivered. Such updates are written at most once a second, because a
                repeated delivery after a crash is harmless. They advance an artifact worker that has no backlog.
            fields: new values of fields of `Delivered`.
        """
        with self._changed:
            before = self._delivered
            if is_points and before.models_offset == before.offset:
                fields["models_offset"] = fields["offset"]
            known = {**before.models, **(models or {})}
            self._delivered = replace(
                before,
                models={name: model_id for name, model_id in known.items() if model_id is not None},
                # Bounded; the publisher's log has all of them.
                refused=(*before.refused, *([refused] if refused else []))[:MAX_REFUSED_KEPT],
                num_refused=before.num_refused + (refused is not None),
                **fields,
            )
            self._is_written = False
            if not is_points or time.monotonic() >= self._next_write_s:
                self._write()
            self._changed.notify_all()

    def flush(self) -> None:
        """Write updates that are only in memory."""
        with self._changed:
            if not self._is_written:
                self._write()

    def _write(self) -> None:
        # On a full disk the record is outdated. After a crash the deliveries are repeated, which is harmless.
        with suppress(OSError):
            write_delivered(self._outbox_dir, self._delivered)
            self._is_written = True
        self._next_write_s = time.monotonic() + _WRITE_EVERY_S

    def skip_files(self, offset: int) -> None:
        """Advance `models_offset` where there are no entries of `FILES`. Written with the next update."""
        with self._changed:
            self._delivered = replace(self._delivered, models_offset=offset)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[Delivered], bool], timeout_s: float | None = None) -> bool:
        """Wait for a condition on the record, a timeout or `close`; return whether the record meets the condition."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or condition(self._delivered), timeout_s)
            return condition(self._delivered)

    @property
    def is_closed(self) -> bool:
        """Whether the artifact worker must stop."""
        return self._is_closed

    def close(self) -> None:
        """Write pending updates and wake all waiting threads."""
        self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
