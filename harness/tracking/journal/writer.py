"""The outbox: an append-only journal of what the tracking store has not acknowledged yet.

Nothing here knows MLflow or the network. What a writer that died has left unfinished at the end is cut off by the next.

The journal is bounded. It is kept in files (`segments`); what is delivered goes, the oldest first, once the journal has
half the size that it may have (`pruning`). Where all of it is taken by what the store has not had, metrics are left out
and counted, until the store takes some.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.io.durable_files import open_private, sync_directory
from harness.tracking.journal.entries import POINTS, Kind, line_of
from harness.tracking.journal.pruning import read_pruned
from harness.tracking.journal.segments import path_of, remove_behind, segments

# In memory, while the disk takes nothing: a million points or so.
MAX_WAITING_BYTES = 32 * 1024**2
# Of the journal on disk; `tracking.max_outbox_size`.
DEFAULT_MAX_BYTES = 2 * 10**9
_MAX_SEGMENT_BYTES = 64 * 1024**2
_LOOK_AGAIN_S = 1.0
# Read, too: a file that was removed can be copied.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


class JournalWriter:
    """The writing end, held by rank zero's trainer alone.

    A disk that takes nothing, full or out of reach for a while, ends no training: entries wait in memory, in their
    order and with their times, and go before the next ones once it takes them. Of more than `MAX_WAITING_BYTES`,
    metrics are left out, and counted; so are they while the journal has reached its size.

    Effects: not collective; any thread; blocks for one `write` into the page cache; leaves
    ``<directory>/journal.jsonl``, and more files where it grows large; its user alone can read them.

    Args:
        directory: the outbox.
        max_bytes: how large the journal may grow.
        say: takes a line for the user.

    Attributes:
        num_left_out: entries of metrics that there was no room for.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int = DEFAULT_MAX_BYTES,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._say = say
        self.num_left_out = 0
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, max_bytes // 16)
        self._lock = threading.Lock()
        # Held for as long as the disk takes, and before the other where both are: an append never waits for it.
        self._sync_lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._trouble: OSError | None = None
        self._is_full = False
        self._has_ended = self._is_closed = False
        self._look_at_s = 0.0
        # Written, and not yet known to be on the disk itself: where each ends in the journal, its path, its descriptor.
        # `sync` and `close` alone close files.
        self._earlier_files: list[tuple[int, Path, int]] = []
        self.path = path_of(directory, 0)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = segments(directory)
            self._begin = found[-1].begin if found else 0
            self.path = path_of(directory, self._begin)
            _cut_torn_line(self.path)
            self._file = open_private(self.path, _FLAGS)
            self._size_bytes = os.fstat(self._file).st_size
            self._is_torn = False
            remove_behind(directory, self._begin + self._size_bytes)
            self._total_bytes = sum(each.end - each.begin for each in segments(directory))
        except OSError as error:
            raise TrackingError(f"{self.path}: cannot open the outbox: {error.strerror}") from error

    def append(self, kind: Kind, body: Mapping[str, Any], time_ms: int | None = None) -> int:
        """Write one entry, or keep it until the disk takes it; returns its time in milliseconds since the epoch.

        Nothing is taken once this is closed.
        """
        stamp = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        line = line_of(kind, stamp, body)
        with self._lock:
            if self._is_closed or (self._has_ended and kind == "system"):
                # Of a thread that was not waited for any longer: behind the end there is nothing.
                return stamp
            self._has_ended |= kind == "end"
            if kind in POINTS and self._has_reached_size():
                self.num_left_out += 1
                return stamp
            if not self._waiting:
                try:
                    self._write(line)
                    return stamp
                except OSError as error:
                    self._trouble = error
            if kind in POINTS and self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
                self.num_left_out += 1
            else:
                self._waiting.append(line)
                self._waiting_bytes += len(line)
            self._write_waiting()
        return stamp

    @property
    def end(self) -> int:
        """Bytes of the journal, those that are gone included."""
        with self._lock:
            return self._begin + self._size_bytes

    @property
    def trouble(self) -> str | None:
        """Why entries wait in memory, or are left out; None: all is well."""
        with self._lock:
            if self._trouble is not None:
                return self._error("cannot append to the outbox", self._trouble)
            if self._is_full:
                return (
                    f"{self._directory}: {self._total_bytes / 1e6:,.0f} MB wait for MLflow, as many as the outbox may "
                    "hold (tracking.max_outbox_size); metrics are left out until some are delivered"
                )
            return None

    def sync(self) -> None:
        """Wait until everything appended is on the disk itself, in a file that the publisher finds.

        A file of the journal that was removed or moved away meanwhile is written again, as far as it is still open.
        Nothing is done once this is closed.

        Raises:
            TrackingError: if the disk does not take it.
        """
        with self._sync_lock:
            try:
                with self._lock:
                    if self._is_closed:
                        return
                    self._write_waiting()
                    if self._trouble is not None:
                        raise self._trouble
                    self._restore_files()
                    earlier, file = list(self._earlier_files), self._file
                for _, _, each in earlier:
                    os.fsync(each)
                if earlier:
                    sync_directory(self._directory)
                os.fsync(file)
            except OSError as error:
                with self._lock:
                    message = self._error("cannot append to the outbox", error)
                raise TrackingError(message) from error
            with self._lock:
                del self._earlier_files[: len(earlier)]
            for _, _, each in earlier:
                os.close(each)

    def close(self) -> None:
        """Close the files; nothing is taken any more. A second call does nothing."""
        with self._sync_lock, self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for file in (*(file for _, _, file in self._earlier_files), self._file):
                os.close(file)

    def _restore_files(self) -> None:
        # Files that are delivered are removed by the publisher; read only where there are several.
        pruned_end = read_pruned(self._directory).end if self._earlier_files else None
        for index, (end, path, file) in enumerate(self._earlier_files):
            if pruned_end is not None and end > pruned_end:
                self._earlier_files[index] = (end, path, self._restored(path, file))
        self._file = self._restored(self.path, self._file)

    def _restored(self, path: Path, file: int) -> int:
        """The descriptor of one of the journal's files; if the file is no longer at its path, of a copy that is."""
        if not stat.S_ISREG(os.fstat(file).st_mode) or _is_at(path, file):
            return file
        self._directory.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".new")
        copy = open_private(beside, _FLAGS | os.O_TRUNC)
        try:
            # By the descriptor: there is no name to open it by.
            while content := os.pread(file, 2**20, os.fstat(copy).st_size):
                if os.write(copy, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(beside, path)
        except OSError:
            os.close(copy)
            raise
        os.close(file)
        sync_directory(self._directory)
        self._say(f"{path}: was removed while the run is training; it is there again")
        return copy

    def _has_reached_size(self) -> bool:
        """Whether there is no room; looked at again from time to time, as the publisher makes some."""
        if self._total_bytes < self._max_bytes:
            self._is_full = False
        elif time.monotonic() >= self._look_at_s:
            self._look_at_s = time.monotonic() + _LOOK_AGAIN_S
            with suppress(OSError):
                self._total_bytes = sum(each.end - each.begin for each in segments(self._directory))
            self._is_full = self._total_bytes >= self._max_bytes
        return self._is_full

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
            if self._size_bytes >= self._segment_bytes:
                self._begin_segment()
            if os.write(self._file, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._size_bytes += len(line)
            self._total_bytes += len(line)
        except OSError:
            self._is_torn = True  # should the disk refuse this too, the next append tries again
            with suppress(OSError):
                os.ftruncate(self._file, self._size_bytes)
                self._is_torn = False
            raise

    def _begin_segment(self) -> None:
        begin = self._begin + self._size_bytes
        path = path_of(self._directory, begin)
        file = open_private(path, _FLAGS)
        # Not waited for here, on the trainer's thread: `sync` does.
        self._earlier_files.append((begin, self.path, self._file))
        self.path, self._file, self._begin, self._size_bytes = path, file, begin, 0

    def _error(self, what: str, error: OSError) -> str:
        waiting = f" ({len(self._waiting)} entries wait in memory)" if self._waiting else ""
        return f"{self.path}: {what}: {error.strerror}; free space there{waiting}"


def _is_at(path: Path, file: int) -> bool:
    """Whether a path leads to the file that is open. On NFS a removed file keeps a link, of another name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _cut_torn_line(path: Path) -> None:
    """Take off what an earlier writer had not finished, so that the next line starts a line."""
    if not path.exists():
        return
    with open(path, "r+b", opener=open_private) as stream:
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
