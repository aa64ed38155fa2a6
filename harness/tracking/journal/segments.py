"""The journal's files, and where each of them begins in the whole.

journal.jsonl           from byte 0 on; the only one of most runs
journal.<begin>.jsonl   from byte <begin> on, where the one before has grown large
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.io.durable_files import sync_directory

JOURNAL = "journal.jsonl"

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


def _files(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    names = {path: match for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    return sorted((int(match[1] or 0), path) for path, match in names.items())
