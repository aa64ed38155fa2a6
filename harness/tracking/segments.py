"""The journal's files: where each of them begins in the whole, which may go, and what is remembered of those.

journal.jsonl           from byte 0 on; the only one of most runs
journal.<begin>.jsonl   from byte <begin> on, where the one before has grown large
pruned.json             what an attempt must know of files that are gone
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.durable import replace_file, sync_directory

JOURNAL = "journal.jsonl"
PRUNED = "pruned.json"

_NAME = re.compile(r"journal(?:\.(\d+))?\.jsonl")


@dataclass(frozen=True)
class Segment:
    """One file of the journal. `begin` is the number of bytes of the journal before it, `end` those with it."""

    path: Path
    begin: int
    end: int


def path_of(directory: Path, begin: int) -> Path:
    """Where the file is that begins at a byte of the journal."""
    return directory / (JOURNAL if begin == 0 else f"journal.{begin:016}.jsonl")


def segments(directory: Path) -> list[Segment]:
    """The files that follow each other without a gap, in order.

    After a crash of the machine a file may have lost its end, and the next one not: what is behind a gap was never
    on the disk as a whole, and is not counted.
    """
    found: list[Segment] = []
    for begin, path in _files(directory):
        if found and begin != found[-1].end:
            break
        # One that the publisher has pruned meanwhile.
        with suppress(FileNotFoundError):
            found.append(Segment(path, begin, begin + path.stat().st_size))
    return found


def remove_behind(directory: Path, end: int) -> None:
    """Remove the files behind a gap, which begin at or behind `end`."""
    for begin, path in _files(directory):
        if begin > end:
            path.unlink()


def journal_end(directory: Path) -> int:
    """Bytes of the journal, those that are gone included; 0 where there is none."""
    found = segments(directory)
    return found[-1].end if found else 0


def durable_end(directory: Path, offset: int) -> int:
    """Bytes of the journal that are on the disk itself when this returns: all that there are, from `offset` on.

    Effects: not collective; any thread or process; blocks on fsync where there is something behind `offset`.
    """
    found = [segment for segment in segments(directory) if segment.end > offset]
    for segment in found:
        descriptor = os.open(segment.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if len(found) > 1:
        sync_directory(directory)
    return found[-1].end if found else offset


@dataclass(frozen=True)
class Pruned:
    """What is known of entries that are gone.

    Args:
        latest: metric -> value, time in milliseconds since the epoch and step of its point of the highest step.
        params: name -> text, as it was first.
        checkpoints: the keys of the checkpoints.
    """

    latest: Mapping[str, tuple[float, int, int]] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    checkpoints: frozenset[str] = frozenset()


def read_pruned(directory: Path) -> Pruned:
    """What is remembered; nothing where nothing has gone. To be read after the journal: a file may go meanwhile."""
    try:
        record: dict[str, Any] = json.loads((directory / PRUNED).read_text())
    except FileNotFoundError:
        return Pruned()
    latest = {key: (value, time_ms, step) for key, (value, time_ms, step) in record["latest"].items()}
    return Pruned(latest, record["params"], frozenset(record["checkpoints"]))


def write_pruned(directory: Path, pruned: Pruned) -> None:
    """Replace it in one step.

    Effects: not collective, the publisher's; blocks on fsync; leaves ``<directory>/pruned.json``.
    """
    record = {"latest": pruned.latest, "params": pruned.params, "checkpoints": sorted(pruned.checkpoints)}
    replace_file(directory / PRUNED, json.dumps(record))


def _files(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    names = {path: match for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    return sorted((int(match[1] or 0), path) for path, match in names.items())
