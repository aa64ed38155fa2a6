"""Remove delivered files of the journal and summarize their entries in ``pruned.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from harness.io.durable_files import parse_record, replace_file
from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import Entry, Kind, Segment, list_segments, read_entries

PRUNED = "pruned.json"

_SUMMARIZED: Final[tuple[Kind, ...]] = ("metrics", "params", "checkpoint")


@dataclass(frozen=True)
class Pruned:
    """Summary of the entries in pruned files.

    Args:
        latest: metric -> value, time in milliseconds since the epoch, and step of its point with the highest step.
        params: name -> first value.
        end: end offset of the pruned part of the journal; None if an earlier version has pruned it.
    """

    latest: Mapping[str, tuple[float, int, int]] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()
    end: int | None = 0


def read_pruned(directory: Path) -> Pruned:
    """Read the summary, empty if missing or damaged. Read the journal first: a file may be pruned in between."""
    return parse_record(directory / PRUNED, _parse) or Pruned()


def pruned_problem(directory: Path) -> str | None:
    """Return a message for the user if the summary is damaged, else None."""
    path = directory / PRUNED
    if not path.exists() or parse_record(path, _parse) is not None:
        return None
    return f"{path}: is damaged; pruned points that are logged again will be in MLflow twice"


def _parse(record: dict[str, Any]) -> Pruned:
    latest = {key: (float(value), int(time), int(step)) for key, (value, time, step) in record["latest"].items()}
    return Pruned(latest, dict(record["params"]), frozenset(record["checkpoints"]), record.get("end"))


def write_pruned(directory: Path, pruned: Pruned) -> None:
    """Replace ``pruned.json`` atomically. The publisher only; blocks on fsync."""
    record = {
        "latest": pruned.latest,
        "params": pruned.params,
        "checkpoints": sorted(pruned.checkpoints),
        "end": pruned.end,
    }
    replace_file(directory / PRUNED, json.dumps(record))


def count_lost_bytes(directory: Path, segments: Sequence[Segment], offset: int) -> int:
    """Count the bytes after `offset` that are missing from the journal and were not pruned."""
    if not segments or segments[0].begin <= offset:
        return 0
    pruned = parse_record(directory / PRUNED, _parse) if (directory / PRUNED).exists() else Pruned()
    if pruned is None or pruned.end is None:
        return 0  # unknown
    return max(0, segments[0].begin - max(offset, pruned.end))


def prune(directory: Path, delivered: Delivered, keep_bytes: int) -> int:
    """Remove and summarize the oldest delivered files until the journal has at most `keep_bytes`; return their number.

    Effects: not collective; the publisher only; blocks on the disk; leaves ``pruned.json``.
    """
    segments = list_segments(directory)
    size_bytes = sum(each.end - each.begin for each in segments)
    delivered_end = min(delivered.offset, delivered.models_offset)
    num_removed = 0
    for segment in segments[:-1]:
        if size_bytes <= keep_bytes or segment.end > delivered_end:
            break
        # Summarize before removing, so that a crash in between loses no entry. A repeated summary is harmless.
        entries = read_entries(directory, 0, _SUMMARIZED, segment.end)
        write_pruned(directory, replace(_summarize(read_pruned(directory), entries), end=segment.end))
        segment.path.unlink()
        size_bytes -= segment.end - segment.begin
        num_removed += 1
    return num_removed


def _summarize(pruned: Pruned, entries: Iterator[Entry]) -> Pruned:
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
