"""Encode, store and read the journal's entries.

An entry is one line: eight hex digits of CRC-32, a space, JSON, a newline. The reader stops at a last line without a
newline, which is incomplete. A line with a wrong checksum is an entry of kind `damaged`.

    journal.jsonl           from byte 0; the only file of most runs
    journal.<begin>.jsonl   from byte <begin>; begun when the previous file has grown large
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from harness.io.durable_files import sync_directory

JOURNAL = "journal.jsonl"

_SEGMENT_NAME = re.compile(r"journal(?:\.(\d+))?\.jsonl")
_ENCODER = json.JSONEncoder(separators=(",", ":"))

Kind = Literal[
    "attempt", "params", "tags", "metrics", "system", "dataset", "text", "checkpoint", "retire", "end", "damaged"
]
# Kinds that hold points: values by name, at a step.
POINTS: Final[tuple[Kind, ...]] = ("metrics", "system")
# Kinds that are delivered to the artifact store.
FILES: Final[tuple[Kind, ...]] = ("text", "checkpoint", "retire")


class Entry(NamedTuple):
    """One entry of the journal.

    Args:
        kind: the meaning of `body`, see `harness.tracking.tracker`.
        time_ms: milliseconds since the epoch, 0 for `damaged`; makes a repeated delivery idempotent in MLflow.
        body: JSON values; for `damaged`, the bytes of the line as `line`.
        end_offset: journal offset in bytes at the end of this entry.
    """

    kind: Kind
    time_ms: int
    body: Mapping[str, Any]
    end_offset: int


@dataclass(frozen=True)
class Segment:
    """A file of the journal; `begin` and `end` are byte offsets in the journal."""

    path: Path
    begin: int
    end: int


def encode_entry(kind: Kind, time_ms: int, body: Mapping[str, Any]) -> bytes:
    """Encode an entry as a line of the journal."""
    payload = _ENCODER.encode({"kind": kind, "time_ms": time_ms, "body": body}).encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def read_entries(
    directory: Path, offset: int = 0, kinds: Collection[Kind] | None = None, end: int | None = None
) -> Iterator[Entry]:
    """Read the entries after `offset`, oldest first, up to the end or an incomplete line.

    Args:
        directory: the outbox.
        offset: journal offset of the first entry.
        kinds: the kinds to decode; damaged entries are only yielded without it.
        end: journal offset at the end of the last entry; None for the journal's end.
    """
    # `encode_entry` writes the kind first.
    prefixes = None if kinds is None else tuple(f'{{"kind":"{kind}"'.encode() for kind in kinds)
    for segment in list_segments(directory):
        if segment.end <= offset:
            continue
        offset = max(offset, segment.begin)
        try:
            stream = segment.path.open("rb")
        except FileNotFoundError:  # pruned since it was listed, so all of it is delivered
            continue
        with stream:
            stream.seek(offset - segment.begin)
            for line in stream:
                if not line.endswith(b"\n") or (end is not None and offset >= end):
                    return
                offset += len(line)
                payload = _payload_of(line)
                if payload is None and prefixes is None:
                    yield Entry("damaged", 0, {"line": line}, offset)
                if payload is None or (prefixes is not None and not payload.startswith(prefixes)):
                    continue
                # Decoding here saves a third of the time: `json.loads` detects the encoding of bytes.
                record = json.loads(payload.decode())
                yield Entry(record["kind"], record["time_ms"], record["body"], offset)


def has_entries(directory: Path, offset: int, kinds: Collection[Kind] | None = None) -> bool:
    """Whether there is an entry of these kinds (None for any kind) after `offset`."""
    return next(read_entries(directory, offset, kinds), None) is not None


def is_entry_end(directory: Path, offset: int, time_ms: int | None = None) -> bool:
    """Whether an entry ends at `offset` and is not later than `time_ms`, if that is given.

    False if the journal was replaced: a new one has later entries. True at its beginning and for a damaged entry.
    """
    segments = list_segments(directory)
    if offset <= (segments[0].begin if segments else 0):
        return True
    segment = next((each for each in segments if each.begin < offset <= each.end), None)
    try:
        line = b"" if segment is None else _line_before(segment.path, offset - segment.begin)
    except FileNotFoundError:  # pruned since it was listed, so all of it is delivered
        return True
    if not line.endswith(b"\n"):
        return False
    payload = _payload_of(line)
    return payload is None or time_ms is None or json.loads(payload)["time_ms"] <= time_ms


def segment_path(directory: Path, begin: int) -> Path:
    """Return the path of the file that begins at this journal offset."""
    return directory / (JOURNAL if begin == 0 else f"journal.{begin:016}.jsonl")


def list_segments(directory: Path) -> list[Segment]:
    """List the journal's files in order, up to a gap, where a file has lost its end in a crash of the machine."""
    found: list[Segment] = []
    for begin, path in _files(directory):
        if found and begin != found[-1].end:
            break
        with suppress(FileNotFoundError):  # pruned since it was listed
            found.append(Segment(path, begin, begin + path.stat().st_size))
    return found


def remove_segments_after(directory: Path, end: int) -> None:
    """Remove the files after a gap at `end`."""
    for begin, path in _files(directory):
        if begin > end:
            path.unlink()


def journal_end(directory: Path) -> int:
    """Return the journal's end offset, pruned bytes included; 0 if there is no journal."""
    segments = list_segments(directory)
    return segments[-1].end if segments else 0


def sync_segments(segments: Sequence[Segment], offset: int) -> int:
    """Flush the journal's files after `offset` and return the flushed end offset. Any process; blocks on fsync."""
    pending = [segment for segment in segments if segment.end > offset]
    for segment in pending:
        descriptor = os.open(segment.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if len(pending) > 1:
        sync_directory(pending[0].path.parent)
    return pending[-1].end if pending else offset


def _files(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    names = {path: match for path in directory.iterdir() if (match := _SEGMENT_NAME.fullmatch(path.name))}
    return sorted((int(match[1] or 0), path) for path, match in names.items())


def _payload_of(line: bytes) -> bytes | None:
    checksum, _, payload = line[:-1].partition(b" ")
    return payload if checksum == b"%08x" % zlib.crc32(payload) else None


def _line_before(path: Path, position: int) -> bytes:
    """Return the line, or the part of one, that ends at a position of a file."""
    with path.open("rb") as stream:
        start = position
        line = b""
        while start > 0 and b"\n" not in line[:-1]:
            size = min(start, 65536)
            start -= size
            stream.seek(start)
            line = stream.read(size) + line
    return line[line[:-1].rfind(b"\n") + 1 :]
