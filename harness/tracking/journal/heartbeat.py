"""The publisher's sign of life: what tells the trainer a publisher that is slow from one that is dead."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from harness.io.durable_files import open_private

FILE = "alive.json"
_EVERY_S = 0.5
# Longer than any single request may take, its second try included.
DEAD_AFTER_S = 300.0


class Heartbeat:
    """Written by whatever in the publisher comes forward.

    Effects: not collective; any thread; a small file at most twice a second, without fsync; a disk that refuses it
    is no error. Leaves ``<outbox_dir>/alive.json``.

    Args:
        outbox_dir: the outbox.
    """

    def __init__(self, outbox_dir: Path) -> None:
        self._path = outbox_dir / FILE
        self._lock = threading.Lock()
        self._next_s = 0.0
        self._sent_bytes = 0

    def beat(self) -> None:
        """Something has been done."""
        with self._lock:
            if time.monotonic() < self._next_s:
                return
            self._next_s = time.monotonic() + _EVERY_S
            record = {"pid": os.getpid(), "sent_bytes": self._sent_bytes}
            temporary = self._path.with_suffix(".tmp")
            with suppress(OSError):
                with open(temporary, "w", opener=open_private) as stream:
                    stream.write(json.dumps(record))
                temporary.replace(self._path)

    def sent(self, num_bytes: int) -> None:
        """So many bytes of files have gone to the store, since this began."""
        with self._lock:
            self._sent_bytes += num_bytes
        self.beat()


def silent_for_s(outbox_dir: Path, since_s: float) -> float:
    """Seconds since the last sign of life, or since `since_s` (of `time.time`) where that is later."""
    with suppress(OSError):
        since_s = max(since_s, (outbox_dir / FILE).stat().st_mtime)
    return time.time() - since_s


def sent_bytes(outbox_dir: Path) -> int:
    """Bytes of files that the publisher that beats now has sent; 0 where that is not known."""
    try:
        return int(json.loads((outbox_dir / FILE).read_text())["sent_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
