"""Which of the journal's files may go, and what is remembered of those: ``pruned.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from harness.io.durable_files import read_record, replace_file
from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import Entry, Kind, read_entries
from harness.tracking.journal.segments import segments

PRUNED = "pruned.json"

_KEPT: Final[tuple[Kind, ...]] = ("metrics", "params", "checkpoint")


@dataclass(frozen=True)
class Pruned:
    """What is known of entries that are gone.

    Args:
        latest: metric -> value, time in milliseconds since the epoch and step of its point of the highest step.
        params: name -> text, as it was first.
        checkpoints: the keys of the checkpoints.
        end: bytes of the journal that were removed because they were delivered; None: an earlier version, which kept no
            count, has removed some.
    """

    latest: Mapping[str, tuple[float, int, int]] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()
    end: int | None = 0


def read_pruned(directory: Path) -> Pruned:
    """What is remembered; nothing where nothing has gone, or the file is damaged.

    To be read after the journal: a file may go meanwhile.
    """
    return _as_written(directory) or Pruned()


def problem_of(directory: Path) -> str | None:
    """Why it is not known what has gone, as a line for the user; None: it is, or nothing has."""
    path = directory / PRUNED
    if not path.exists() or _as_written(directory) is not None:
        return None
    return f"{path}: is damaged; points of before the journal's beginning that come again are in MLflow twice"


def _as_written(directory: Path) -> Pruned | None:
    record = read_record(directory / PRUNED)
    if record is None:
        return None
    try:
        latest = {key: (float(value), int(time), int(step)) for key, (value, time, step) in record["latest"].items()}
        return Pruned(latest, dict(record["params"]), frozenset(record["checkpoints"]), record.get("end"))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def write_pruned(directory: Path, pruned: Pruned) -> None:
    """Replace it in one step.

    Effects: not collective, the publisher's; blocks on fsync; leaves ``<directory>/pruned.json``.
    """
    record = {
        "latest": pruned.latest,
        "params": pruned.params,
        "checkpoints": sorted(pruned.checkpoints),
        "end": pruned.end,
    }
    replace_file(directory / PRUNED, json.dumps(record))


def num_lost(directory: Path, offset: int) -> int:
    """Bytes of the journal from `offset` on that are gone, and were not removed because they were delivered."""
    found = segments(directory)
    if not found or found[0].begin <= offset:
        return 0
    pruned = _as_written(directory) if (directory / PRUNED).exists() else Pruned()
    if pruned is None or pruned.end is None:
        return 0  # it is not known
    return max(0, found[0].begin - max(offset, pruned.end))


def prune(directory: Path, delivered: Delivered, keep_bytes: int) -> int:
    """Remove the oldest files of the journal, of those that are delivered, until it is as small as wished.

    What an attempt must know of them is kept.

    Effects: not collective, the publisher's; blocks on the disk; leaves ``pruned.json``.

    Args:
        directory: the outbox.
        delivered: how far the store has come.
        keep_bytes: how large it may stay.

    Returns:
        The number of files that are gone.
    """
    found = segments(directory)
    size_bytes = sum(each.end - each.begin for each in found)
    done = min(delivered.offset, delivered.models_offset)
    num_gone = 0
    for segment in found[:-1]:
        if size_bytes <= keep_bytes or segment.end > done:
            break
        # First: one that is there twice is known by its name, one that is nowhere is lost.
        entries = read_entries(directory, 0, _KEPT, segment.end)
        write_pruned(directory, replace(_remembered(read_pruned(directory), entries), end=segment.end))
        segment.path.unlink()
        size_bytes -= segment.end - segment.begin
        num_gone += 1
    return num_gone


def _remembered(pruned: Pruned, entries: Iterator[Entry]) -> Pruned:
    latest, params, checkpoints = dict(pruned.latest), dict(pruned.params), set(pruned.checkpoints)
    for entry in entries:
        if entry.kind == "params":
            params = {**entry.body, **params}
        elif entry.kind == "checkpoint":
            checkpoints.add(entry.body["key"])
        else:
            step = entry.body["step"]
            for key, value in entry.body["values"].items():
                if key not in latest or latest[key][2] < step:
                    latest[key] = (value, entry.time_ms, step)
    return Pruned(latest, params, frozenset(checkpoints))
