"""How far the store has come with the outbox: one record for the publisher's two lanes, on disk after each step."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.durable import replace_file

DELIVERED = "delivered.json"
MAX_REFUSED_KEPT = 20


@dataclass(frozen=True)
class Delivered:
    """How far the publisher has come.

    Args:
        offset: bytes of the journal that the store has acknowledged, but for what goes to the artifact store.
        models_offset: the same for that: checkpoints, their retirements, texts.
        models: checkpoint name -> id of the LoggedModel it became.
        refused: what the store said no to, for good; the first `MAX_REFUSED_KEPT` of it.
        num_refused: how much that is in all.
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


def read_delivered(directory: Path) -> Delivered:
    """The publisher's record, or the empty one where it has written none."""
    try:
        record = json.loads((directory / DELIVERED).read_text())
    except FileNotFoundError:
        return Delivered()
    return Delivered(
        record["offset"],
        record["models"],
        tuple(record["refused"]),
        record["ended"],
        record.get("time_ms", 0),
        record.get("step", 0),
        # Before there were two lanes, all went in one.
        record.get("models_offset", record["offset"]),
        record.get("num_refused", len(record["refused"])),
    )


def write_delivered(directory: Path, delivered: Delivered) -> None:
    """Replace the publisher's record in one step."""
    replace_file(directory / DELIVERED, json.dumps({**asdict(delivered), "models": dict(delivered.models)}))


class Acknowledged:
    """The publisher's own record.

    Effects: not collective; any thread; `update` blocks on fsync; leaves ``<outbox_dir>/delivered.json``.

    Args:
        outbox_dir: the outbox.
    """

    def __init__(self, outbox_dir: Path) -> None:
        self._outbox_dir = outbox_dir
        self._changed = threading.Condition()
        self._delivered = read_delivered(outbox_dir)
        self._is_closed = False

    @property
    def now(self) -> Delivered:
        """As it is at this moment."""
        with self._changed:
            return self._delivered

    def update(self, *, models: dict[str, str | None] | None = None, refused: str | None = None, **fields: Any) -> None:
        """Change it; on disk when this returns, if the disk takes it.

        Args:
            models: checkpoint name -> id of its model, None where there is none any more.
            refused: what the store has said no to for good.
            fields: of `Delivered`, as they are now.
        """
        with self._changed:
            before = self._delivered
            known = {**before.models, **(models or {})}
            self._delivered = replace(
                before,
                models={name: model_id for name, model_id in known.items() if model_id is not None},
                # Each is in the publisher's log; here they would grow with the run.
                refused=(*before.refused, *([refused] if refused else []))[:MAX_REFUSED_KEPT],
                num_refused=before.num_refused + (refused is not None),
                **fields,
            )
            # A full disk: what is behind the record on disk is delivered again after a crash, and leaves the same.
            with suppress(OSError):
                write_delivered(self._outbox_dir, self._delivered)
            self._changed.notify_all()

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
        """Wake all that wait."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
