"""How far the store has come with the outbox: one record for the publisher's two lanes, kept on disk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.io.durable_files import read_record, replace_file
from harness.tracking.journal.entries import FILES, fits, has_entries

DELIVERED = "delivered.json"
# The bytes of journal entries that were damaged, for whoever wants to look.
DAMAGED_ENTRIES = "damaged_entries.jsonl"
MAX_REFUSED_KEPT = 20
# Between two writes after batches of points. A write waits twice for the disk: in a backlog, for each batch.
_WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class Delivered:
    """How far the publisher has come.

    Args:
        offset: bytes of the journal that the store has acknowledged, but for what goes to the artifact store.
        models_offset: the same for that: checkpoints, their retirements, texts.
        models: checkpoint name -> id of the LoggedModel it became.
        refused: what the store said no to, for good; the first `MAX_REFUSED_KEPT` of it.
        num_refused: how much that is in all.
        num_damaged: entries of the journal that were damaged on disk, and so are not delivered.
        files_trouble: why the artifact store does not take what is next, since when the end did not wait for it; empty:
            it does.
        ended: whether the last thing delivered was the run's end.
        time_ms: when the last thing delivered happened.
        step: the last step of the running attempt that was delivered.
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
    """The publisher's record of what is delivered of this journal.

    Where there is none, or it cannot be read, or it does not fit the journal (which was removed, or cut), nothing is:
    then all of the journal is delivered again, and leaves what once would have left.
    """
    delivered = _as_written(directory) or Delivered()
    if not fits(directory, delivered.offset, delivered.time_ms or None):
        return replace(delivered, offset=0, models_offset=0, ended=False, refused=(), num_refused=0, num_damaged=0)
    if not fits(directory, delivered.models_offset):
        return replace(delivered, models_offset=0)
    return delivered


def has_more(directory: Path, delivered: Delivered) -> bool:
    """Whether the journal has something that is not delivered, files among it."""
    # What is on disk of `models_offset` may be behind: there need be no file between.
    return has_entries(directory, delivered.offset) or has_entries(directory, delivered.models_offset, FILES)


def problem_of(directory: Path) -> str | None:
    """Why the record of what is delivered is not believed, as a line for the user; None: it is, or there is none."""
    path = directory / DELIVERED
    if not path.exists():
        return None
    written = _as_written(directory)
    if written is None:
        return f"{path}: is damaged; all of the journal is delivered again, which changes nothing that is there"
    if read_delivered(directory).offset != written.offset:
        return f"{path}: does not fit the journal, which was removed or changed; all of it is delivered"
    return None


def _as_written(directory: Path) -> Delivered | None:
    """What the file says; None where there is none, or it is damaged."""
    record = read_record(directory / DELIVERED)
    if record is None:
        return None
    try:
        offset, refused = int(record["offset"]), tuple(record["refused"])
        return Delivered(
            offset,
            dict(record["models"]),
            refused,
            bool(record["ended"]),
            int(record.get("time_ms", 0)),
            int(record.get("step", 0)),
            # Before there were two lanes, all went in one.
            min(offset, int(record.get("models_offset", offset))),
            int(record.get("num_refused", len(refused))),
            str(record.get("files_trouble", "")),
            int(record.get("num_damaged", 0)),
        )
    except (KeyError, TypeError, ValueError):
        return None


def write_delivered(directory: Path, delivered: Delivered) -> None:
    """Replace the publisher's record in one step."""
    record = {**asdict(delivered), "models": dict(delivered.models)}
    # The store's errors name hosts.
    replace_file(directory / DELIVERED, json.dumps(record), is_private=True)


class DeliveryState:
    """The publisher's own record.

    Effects: not collective; any thread; `update`, `write` and `close` block on fsync where they write; leaves
    ``<outbox_dir>/delivered.json``.

    Args:
        outbox_dir: the outbox.
    """

    def __init__(self, outbox_dir: Path) -> None:
        self._outbox_dir = outbox_dir
        self._changed = threading.Condition()
        self._delivered = read_delivered(outbox_dir)
        self._is_written = True
        self._next_write_s = 0.0
        self._is_closed = False

    @property
    def now(self) -> Delivered:
        """As it is at this moment."""
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
        """Change it; on disk when this returns, if the disk takes it.

        Args:
            models: checkpoint name -> id of its model, None where there is none any more.
            refused: what the store has said no to for good.
            is_points: only metrics were delivered. The lane of models need not look at them where it has come as far.
                The disk may get this with a later update, `write` or `close`, if it got one less than a second ago:
                after a crash what was not written is delivered again, and leaves the same.
            fields: of `Delivered`, as they are now.
        """
        with self._changed:
            before = self._delivered
            if is_points and before.models_offset == before.offset:
                fields["models_offset"] = fields["offset"]
            known = {**before.models, **(models or {})}
            self._delivered = replace(
                before,
                models={name: model_id for name, model_id in known.items() if model_id is not None},
                # Each is in the publisher's log; here they would grow with the run.
                refused=(*before.refused, *([refused] if refused else []))[:MAX_REFUSED_KEPT],
                num_refused=before.num_refused + (refused is not None),
                **fields,
            )
            self._is_written = False
            if not is_points or time.monotonic() >= self._next_write_s:
                self._write()
            self._changed.notify_all()

    def write(self) -> None:
        """Put on disk what an update has left in memory; nothing where there is none."""
        with self._changed:
            if not self._is_written:
                self._write()

    def _write(self) -> None:
        # A full disk: what is behind the record on disk is delivered again after a crash, and leaves the same.
        with suppress(OSError):
            write_delivered(self._outbox_dir, self._delivered)
            self._is_written = True
        self._next_write_s = time.monotonic() + _WRITE_EVERY_S

    def pass_models(self, offset: int) -> None:
        """There is nothing for the lane of models up to here. On disk with the next update: it is soon found again."""
        with self._changed:
            self._delivered = replace(self._delivered, models_offset=offset)
            self._changed.notify_all()

    def wait(self, is_enough: Callable[[Delivered], bool], timeout_s: float | None = None) -> bool:
        """Wait until the record is as wished, or this is closed; whether it is as wished."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or is_enough(self._delivered), timeout_s)
            return is_enough(self._delivered)

    @property
    def is_closed(self) -> bool:
        """Whether nobody shall wait any more."""
        return self._is_closed

    def close(self) -> None:
        """Wake all that wait, and write what no update has written."""
        self.write()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
