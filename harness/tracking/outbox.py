"""The outbox: an append-only journal of what the tracking store has not acknowledged yet.

One line for each entry: eight hex digits of CRC-32, a space, JSON, a newline. A line whose checksum
or newline is missing was being written when something died; the reader stops there, and the next
writer cuts it off. Nothing here knows MLflow or the network.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.durable import replace_file
from harness.errors import TrackingError

JOURNAL = "journal.jsonl"
DELIVERED = "delivered.json"

# A million points or so.
MAX_WAITING_BYTES = 32 * 1024**2

_ENCODER = json.JSONEncoder(separators=(",", ":"))

Kind = Literal["attempt", "params", "tags", "metrics", "dataset", "text", "checkpoint", "retire", "end"]


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


class Outbox:
    """The writing end, held by rank zero's trainer alone.

    A disk that takes nothing, full or out of reach for a while, ends no training: entries wait in memory, in their
    order and with their times, and go before the next ones once it takes them. Of more than `MAX_WAITING_BYTES`,
    metrics are left out, and counted.

    Effects: not collective; any thread; blocks for one `write` into the page cache; leaves
    ``<directory>/journal.jsonl``.

    Attributes:
        num_left_out: entries of metrics that there was no room for.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL
        self.num_left_out = 0
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._trouble: OSError | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            self._size_bytes = os.fstat(self._file).st_size
            self._is_torn = False
        except OSError as error:
            raise TrackingError(f"{self.path}: cannot open the outbox: {error.strerror}") from error

    def append(self, kind: Kind, body: Mapping[str, Any], time_ms: int | None = None) -> int:
        """Write one entry, or keep it until the disk takes it; returns its time in milliseconds since the epoch."""
        stamp = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        payload = _ENCODER.encode({"kind": kind, "time_ms": stamp, "body": body}).encode()
        line = b"%08x %b\n" % (zlib.crc32(payload), payload)
        with self._lock:
            if not self._waiting:
                try:
                    self._write(line)
                    return stamp
                except OSError as error:
                    self._trouble = error
            if kind == "metrics" and self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self.num_left_out += 1
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
            self._write_waiting()
        return stamp

    @property
    def trouble(self) -> str | None:
        """Why entries wait in memory; None: none does."""
        with self._lock:
            return None if self._trouble is None else self._error("cannot append to the outbox", self._trouble)

    def sync(self) -> None:
        """Wait until everything appended is on the disk itself.

        Raises:
            TrackingError: if the disk does not take it.
        """
        with self._lock:
            self._write_waiting()
            try:
                if self._trouble is not None:
                    raise self._trouble
                os.fsync(self._file)
            except OSError as error:
                raise TrackingError(self._error("cannot append to the outbox", error)) from error

    def close(self) -> None:
        """Close the file. Appending afterwards is an error of ours."""
        os.close(self._file)

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
            self._trouble = None
        except OSError as error:
            self._trouble = self._trouble or error  # the first says more: what follows may be of taking back alone

    def _write(self, line: bytes) -> None:
        """Append a line, whole; what a disk took of one that it did not take is taken back."""
        try:
            if self._is_torn:
                os.ftruncate(self._file, self._size_bytes)
                self._is_torn = False
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size_bytes += len(line)
        except OSError:
            self._is_torn = True  # should the disk refuse this too, the next append tries again
            with suppress(OSError):
                os.ftruncate(self._file, self._size_bytes)
                self._is_torn = False
            raise

    def _error(self, what: str, error: OSError) -> str:
        waiting = f" ({len(self._waiting)} entries wait in memory)" if self._waiting else ""
        return f"{self.path}: {what}: {error.strerror}; free space there{waiting}"


def read_entries(directory: Path, offset: int = 0, kinds: Collection[Kind] | None = None) -> Iterator[Entry]:
    """The whole entries behind `offset`, oldest first; ends at the end or at a line that is not whole.

    Args:
        directory: the outbox.
        offset: in bytes, where an entry begins.
        kinds: only these; the others are not even decoded.

    Raises:
        TrackingError: if a line in the middle of the journal is damaged.
    """
    path = directory / JOURNAL
    if not path.exists():
        return
    # As `Outbox.append` writes them: the kind comes first.
    begins = None if kinds is None else tuple(f'{{"kind":"{kind}"'.encode() for kind in kinds)
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            checksum, _, payload = line[:-1].partition(b" ")
            if checksum != b"%08x" % zlib.crc32(payload):
                raise TrackingError(f"{path}: the entry that ends at byte {offset} is damaged (checksum)")
            if begins is not None and not payload.startswith(begins):
                continue
            record = json.loads(payload)
            yield Entry(record["kind"], record["time_ms"], record["body"], offset)


@dataclass(frozen=True)
class Delivered:
    """How far the publisher has come.

    Args:
        offset: bytes of the journal that the store has acknowledged, but for what goes to the artifact store.
        models_offset: the same for that: checkpoints, their retirements, texts.
        models: checkpoint name -> id of the LoggedModel it became.
        refused: what the store said no to, for good.
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
    )


def write_delivered(directory: Path, delivered: Delivered) -> None:
    """Replace the publisher's record in one step."""
    replace_file(directory / DELIVERED, json.dumps({**asdict(delivered), "models": dict(delivered.models)}))


def _cut_torn_line(path: Path) -> None:
    """Take off what an earlier writer had not finished, so that the next line starts a line."""
    if not path.exists():
        return
    with path.open("r+b") as stream:
        content_end = stream.seek(0, os.SEEK_END)
        position = content_end
        while position > 0:
            start = max(0, position - 65536)
            stream.seek(start)
            newline = stream.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position != content_end:
            stream.truncate(position)
