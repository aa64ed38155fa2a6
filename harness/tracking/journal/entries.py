"""The journal's entries: what a line is, and reading them back.

One line for each entry: eight hex digits of CRC-32, a space, JSON, a newline. A last line without a newline was being
written when something died: the reader stops there. A line with another checksum is an entry of kind `damaged`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from harness.tracking.journal.segments import segments

_ENCODER = json.JSONEncoder(separators=(",", ":"))

Kind = Literal[
    "attempt", "params", "tags", "metrics", "system", "dataset", "text", "checkpoint", "retire", "end", "damaged"
]
# Those that hold points: values by names, at a step.
POINTS: Final[tuple[Kind, ...]] = ("metrics", "system")
# What goes to the artifact store.
FILES: Final[tuple[Kind, ...]] = ("text", "checkpoint", "retire")


class Entry(NamedTuple):
    """One thing to deliver.

    Args:
        kind: what `body` holds; see `harness.tracking.tracker` for each. Of `damaged` it is `line`, the line's bytes.
        time_ms: when it happened, in milliseconds since the epoch. It is what MLflow is told, so
            that a second delivery is the same point. 0 of a damaged one.
        body: JSON values.
        end_offset: bytes of the journal up to and with this entry.
    """

    kind: Kind
    time_ms: int
    body: Mapping[str, Any]
    end_offset: int


def line_of(kind: Kind, time_ms: int, body: Mapping[str, Any]) -> bytes:
    """An entry as the journal has it."""
    payload = _ENCODER.encode({"kind": kind, "time_ms": time_ms, "body": body}).encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def read_entries(
    directory: Path, offset: int = 0, kinds: Collection[Kind] | None = None, end: int | None = None
) -> Iterator[Entry]:
    """The entries behind `offset`, oldest first; ends at the end or at a line without its newline.

    Args:
        directory: the outbox.
        offset: in bytes, where an entry begins.
        kinds: only these, without the damaged ones; the others are not even decoded. None: all of them.
        end: in bytes, where an entry ends; nothing behind it is read.
    """
    # As `line_of` writes them: the kind comes first.
    begins = None if kinds is None else tuple(f'{{"kind":"{kind}"'.encode() for kind in kinds)
    for segment in segments(directory):
        if segment.end <= offset:
            continue
        offset = max(offset, segment.begin)
        try:
            stream = segment.path.open("rb")
        except FileNotFoundError:  # pruned meanwhile: all of it is delivered
            continue
        with stream:
            stream.seek(offset - segment.begin)
            for line in stream:
                if not line.endswith(b"\n") or (end is not None and offset >= end):
                    return
                offset += len(line)
                payload = _payload_of(line)
                if payload is None and begins is None:
                    yield Entry("damaged", 0, {"line": line}, offset)
                if payload is None or (begins is not None and not payload.startswith(begins)):
                    continue
                record = json.loads(payload.decode())  # of bytes, json guesses the encoding: half as long again
                yield Entry(record["kind"], record["time_ms"], record["body"], offset)


def has_entries(directory: Path, offset: int, kinds: Collection[Kind] | None = None) -> bool:
    """Whether there is an entry behind `offset`, of these kinds; None: of any."""
    return next(read_entries(directory, offset, kinds), None) is not None


def fits(directory: Path, offset: int, time_ms: int | None = None) -> bool:
    """Whether an entry of the journal ends at `offset`, and happened at `time_ms` or before where that is given.

    It does not where the journal was removed or replaced, which has later entries then. True too at its beginning,
    with nothing of it to look at, and where the entry is damaged.
    """
    found = segments(directory)
    if offset <= (found[0].begin if found else 0):
        return True
    segment = next((each for each in found if each.begin < offset <= each.end), None)
    try:
        line = b"" if segment is None else _line_before(segment.path, offset - segment.begin)
    except FileNotFoundError:  # pruned meanwhile: all of it is delivered
        return True
    if not line.endswith(b"\n"):
        return False
    payload = _payload_of(line)
    return payload is None or time_ms is None or json.loads(payload)["time_ms"] <= time_ms


def _payload_of(line: bytes) -> bytes | None:
    """The JSON of a line; None: it is damaged."""
    checksum, _, payload = line[:-1].partition(b" ")
    return payload if checksum == b"%08x" % zlib.crc32(payload) else None


def _line_before(path: Path, position: int) -> bytes:
    """The line of a file, or the end of one, that ends at a position."""
    with path.open("rb") as stream:
        start = position
        line = b""
        while start > 0 and b"\n" not in line[:-1]:
            size = min(start, 65536)
            start -= size
            stream.seek(start)
            line = stream.read(size) + line
    return line[line[:-1].rfind(b"\n") + 1 :]
