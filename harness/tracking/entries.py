"""The journal's entries: what a line is, and reading them back.

One line for each entry: eight hex digits of CRC-32, a space, JSON, a newline. A line whose checksum or newline is
missing was being written when something died: the reader stops there.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from harness.errors import TrackingError
from harness.tracking.segments import segments

_ENCODER = json.JSONEncoder(separators=(",", ":"))

Kind = Literal["attempt", "params", "tags", "metrics", "system", "dataset", "text", "checkpoint", "retire", "end"]
# Those that hold points: values by names, at a step.
POINTS: Final[tuple[Kind, ...]] = ("metrics", "system")


@dataclass(frozen=True)
class Entry:
    """One thing to deliver.

    Args:
        kind: what `body` holds; see `harness.tracking.tracker` for each.
        time_ms: when it happened, in milliseconds since the epoch. It is what MLflow is told, so
            that a second delivery is the same point.
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
    """The whole entries behind `offset`, oldest first; ends at the end or at a line that is not whole.

    Args:
        directory: the outbox.
        offset: in bytes, where an entry begins.
        kinds: only these; the others are not even decoded.
        end: in bytes, where an entry ends; nothing behind it is read.

    Raises:
        TrackingError: if a line in the middle of the journal is damaged.
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
                checksum, _, payload = line[:-1].partition(b" ")
                if checksum != b"%08x" % zlib.crc32(payload):
                    raise TrackingError(f"{segment.path}: the entry that ends at byte {offset} is damaged (checksum)")
                if begins is not None and not payload.startswith(begins):
                    continue
                record = _parsed(payload)
                yield Entry(record["kind"], record["time_ms"], record["body"], offset)


def _parsed(payload: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(payload)
    # An argument that is no UTF-8 becomes a half of a surrogate pair, which no database takes, nor PostgreSQL a NUL.
    return _storable(record) if b"\\ud" in payload or b"\\u0000" in payload else record


def _storable(value: Any) -> Any:
    """A JSON value with what a database refuses in a text replaced."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode().replace("\0", "?")
    if isinstance(value, dict):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list) else value
