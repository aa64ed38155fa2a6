from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness.tracking.journal.delivery_state import Delivered, DeliveryState, read_delivered, write_delivered
from harness.tracking.journal.entries import JOURNAL, Entry
from harness.tracking.journal.writer import JournalWriter


def fill(directory: Path, entries: list[Any]) -> list[Entry]:
    """Append all; what should be read back."""
    outbox = JournalWriter(directory)
    expected = []
    for kind, body, time_ms in entries:
        outbox.append(kind, body, time_ms)
        expected.append(Entry(kind, time_ms, body, outbox.path.stat().st_size))
    outbox.close()
    return expected


def test_record_is_empty_when_nothing_was_delivered(tmp_path: Path) -> None:
    assert read_delivered(tmp_path) == Delivered(0, {}, ())


def test_record_is_equal_when_read_back(tmp_path: Path) -> None:
    (entry,) = fill(tmp_path, [("end", {}, 7)])
    record = Delivered(
        entry.end_offset, {"epoch-0001": "m-1"}, ("tags: no",), ended=True, time_ms=7, models_offset=0, num_refused=1
    )
    write_delivered(tmp_path, Delivered(1, {}, ()))
    write_delivered(tmp_path, record)
    assert read_delivered(tmp_path) == record
    assert sorted(os.listdir(tmp_path)) == ["delivered.json", JOURNAL]


def test_file_offset_advances_when_only_points_are_delivered(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    outbox.append("metrics", {"step": 1, "values": {"train/loss": 0.5}})
    first = outbox.end_offset
    outbox.append("text", {"name": "a.txt", "content": "words"})
    second = outbox.end_offset
    outbox.append("metrics", {"step": 2, "values": {"train/loss": 0.5}})
    state = DeliveryState(tmp_path / "outbox")
    state.update(is_points=True, offset=first)
    assert state.current.models_offset == first
    state.update(offset=second)
    state.update(is_points=True, offset=outbox.end_offset)
    assert state.current.models_offset == first  # the text is still to be delivered
    state.close()
    assert read_delivered(tmp_path / "outbox") == state.current
