"""Report the publisher's log, heartbeat and progress to the trainer and the user."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from harness.io.durable_files import open_private
from harness.io.redact import redact
from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.journal.entries import Kind, journal_end, read_entries

HEARTBEAT = "alive.json"
_BEAT_EVERY_S = 0.5
# A publisher without a heartbeat for this long is restarted. Longer than any request of its main thread and its retry.
DEAD_AFTER_S = 300.0

_CHECKPOINTS: Final[tuple[Kind, ...]] = ("checkpoint",)


def log(message: str) -> None:
    """Write one line to the publisher's log, which is its standard error."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    with suppress(OSError):
        sys.stderr.write(f"{stamp} {redact(' '.join(message.split()))}\n")
        sys.stderr.flush()


class Heartbeat:
    """Reports that the publisher is alive, and how many bytes of files it has sent.

    Effects: any thread; writes ``<outbox_dir>/alive.json`` at most twice a second, without fsync; ignores a full disk.
    """

    def __init__(self, outbox_dir: Path) -> None:
        self._path = outbox_dir / HEARTBEAT
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._sent_bytes = 0

    def beat(self) -> None:
        """Report that the publisher is alive."""
        with self._lock:
            if time.monotonic() < self._next_s:
                return
            self._next_s = time.monotonic() + _BEAT_EVERY_S
            record = {"pid": os.getpid(), "sent_bytes": self._sent_bytes}
            temporary = self._path.with_suffix(".tmp")
            with suppress(OSError):
                with open(temporary, "w", opener=open_private) as stream:
                    stream.write(json.dumps(record))
                temporary.replace(self._path)

    def add_sent(self, num_bytes: int) -> None:
        """Count sent bytes of files, or subtract bytes that must be sent again."""
        with self._lock:
            self._sent_bytes += num_bytes
        self.beat()


def seconds_since_heartbeat(outbox_dir: Path, started_at_s: float) -> float:
    """Return the seconds since the last heartbeat, or since `started_at_s` (since the epoch) if that is later."""
    with suppress(OSError):
        started_at_s = max(started_at_s, (outbox_dir / HEARTBEAT).stat().st_mtime)
    return time.time() - started_at_s


def read_sent_bytes(outbox_dir: Path) -> int:
    """Return the bytes of files that the current publisher has sent; 0 if unknown."""
    try:
        return int(json.loads((outbox_dir / HEARTBEAT).read_text())["sent_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@dataclass(frozen=True)
class Remaining:
    """The undelivered part of an outbox; `share` (0 to 1) of the bytes that remained at the start is delivered."""

    num_checkpoints: int
    size_bytes: int
    share: float

    def __str__(self) -> str:
        plural = "s" * (self.num_checkpoints != 1)
        checkpoints = f", {self.num_checkpoints} checkpoint{plural} to go" if self.num_checkpoints else ""
        return f"{self.share:.0%} ({self.size_bytes / 1e6:,.1f} MB left{checkpoints})"


class DeliveryProgress:
    """Measures the delivery of an outbox whose trainer has finished. Any thread; reads small files."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._outbox_dir = run_dir / "outbox"
        delivered = read_delivered(self._outbox_dir)
        # End offset of the entry and size of the files, for each checkpoint.
        self._checkpoints = [
            (entry.end_offset, self._size_bytes(entry.body["name"], entry.body["files"]))
            for entry in read_entries(self._outbox_dir, min(delivered.models_offset, delivered.offset), _CHECKPOINTS)
        ]
        self._sent_before_bytes = read_sent_bytes(self._outbox_dir)
        self._journal_bytes = journal_end(self._outbox_dir)
        self._total_bytes = max(1, self.remaining_bytes())

    def remaining(self) -> Remaining:
        """Measure the undelivered part."""
        remaining_bytes = self.remaining_bytes()
        models_offset = read_delivered(self._outbox_dir).models_offset
        num_checkpoints = sum(offset > models_offset for offset, _ in self._checkpoints)
        return Remaining(num_checkpoints, remaining_bytes, 1 - remaining_bytes / self._total_bytes)

    def remaining_bytes(self) -> int:
        """Count the undelivered bytes."""
        delivered = read_delivered(self._outbox_dir)
        unpublished = sum(size for offset, size in self._checkpoints if offset > delivered.models_offset)
        published = sum(size for offset, size in self._checkpoints if offset <= delivered.models_offset)
        in_progress = max(0, read_sent_bytes(self._outbox_dir) - self._sent_before_bytes - published)
        return max(0, unpublished - in_progress) + self._journal_bytes - delivered.offset

    def _size_bytes(self, name: str, files: list[str]) -> int:
        directory = self._run_dir / "checkpoints" / name
        return sum((directory / file).stat().st_size for file in files if (directory / file).exists())
