"""Append entries to the journal, whose size is bounded.

The publisher removes delivered files once the journal has half of its maximum size (`pruning`). If undelivered entries
fill the journal, metrics are dropped and counted. A new writer removes its predecessor's incomplete last line.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.errors import TrackingError
from harness.io.durable_files import open_private, sync_directory
from harness.tracking.journal.entries import (
    POINTS,
    Kind,
    encode_entry,
    list_segments,
    remove_segments_after,
    segment_path,
)
from harness.tracking.journal.pruning import read_pruned

# Limit of the entries in memory while the disk refuses writes; about a million points.
MAX_PENDING_BYTES = 32 * 1024**2
# Default of `tracking.max_outbox_size`.
DEFAULT_MAX_BYTES = 2 * 10**9
_MAX_SEGMENT_BYTES = 64 * 1024**2
_CHECK_EVERY_S = 1.0
# Readable, so that a removed file can be copied from its descriptor.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


class JournalWriter:
    """Appends entries to the journal, on rank 0 only.

    While the disk is full or unreachable, entries are kept in memory and training continues. Metrics beyond
    `MAX_PENDING_BYTES` or the journal's maximum size are dropped and counted.

    Effects: not collective; any thread; `append` blocks for one `write` into the page cache; leaves
    ``<directory>/journal.jsonl`` and further files once it has grown large, readable only by the user.

    Attributes:
        num_dropped: number of dropped metrics entries.
        warnings: pending warnings. The caller removes the ones it displays.
    """

    def __init__(self, directory: Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.num_dropped = 0
        self.warnings: list[str] = []
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(_MAX_SEGMENT_BYTES, max_bytes // 16)
        self._lock = threading.Lock()
        # Held during fsync and acquired before `_lock`. An append never waits for it.
        self._sync_lock = threading.Lock()
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._error: OSError | None = None
        self._is_full = False
        self._has_ended = self._is_closed = False
        self._next_check_s = 0.0
        # Full files that are not flushed: end offset, path, descriptor. Only `sync` and `close` close them.
        self._earlier_files: list[tuple[int, Path, int]] = []
        self.path = segment_path(directory, 0)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            segments = list_segments(directory)
            self._begin = segments[-1].begin if segments else 0
            self.path = segment_path(directory, self._begin)
            _cut_incomplete_line(self.path)
            self._file = open_private(self.path, _FLAGS)
            self._size_bytes = os.fstat(self._file).st_size
            self._is_torn = False
            remove_segments_after(directory, self._begin + self._size_bytes)
            self._total_bytes = sum(each.end - each.begin for each in list_segments(directory))
        except OSError as error:
            raise TrackingError(f"{self.path}: cannot open the outbox: {error.strerror}") from error

    def append(self, kind: Kind, body: Mapping[str, Any], time_ms: int | None = None) -> int:
        """Write one entry of JSON values, unless closed, and return its time in ms since the epoch (default: now)."""
        stamp = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        line = encode_entry(kind, stamp, body)
        with self._lock:
            if self._is_closed or (self._has_ended and kind == "system"):
                # From a thread that was not joined in time. No entry may follow the end.
                return stamp
            self._has_ended |= kind == "end"
            if kind in POINTS and self._is_at_limit():
                self.num_dropped += 1
                return stamp
            if not self._pending:
                try:
                    self._write(line)
                    return stamp
                except OSError as error:
                    self._error = error
            if kind in POINTS and self._pending_bytes + len(line) > MAX_PENDING_BYTES:
                self.num_dropped += 1
            else:
                self._pending.append(line)
                self._pending_bytes += len(line)
            self._write_pending()
        return stamp

    @property
    def end_offset(self) -> int:
        """The journal's end offset, pruned bytes included."""
        with self._lock:
            return self._begin + self._size_bytes

    @property
    def problem(self) -> str | None:
        """Why entries are kept in memory or dropped; None if there is no problem."""
        with self._lock:
            if self._error is not None:
                return self._message("cannot append to the outbox", self._error)
            if self._is_full:
                return (
                    f"{self._directory}: {self._total_bytes / 1e6:,.0f} MB are not delivered to MLflow, the limit of "
                    "the outbox (tracking.max_outbox_size); metrics are dropped until some are delivered"
                )
            return None

    def sync(self) -> None:
        """Flush all entries to disk, and restore files that were removed or moved. After `close` this does nothing.

        Raises:
            TrackingError: if the disk refuses the entries.
        """
        with self._sync_lock:
            try:
                with self._lock:
                    if self._is_closed:
                        return
                    self._write_pending()
                    if self._error is not None:
                        raise self._error
                    self._restore_files()
                    earlier, file = list(self._earlier_files), self._file
                for _, _, each in earlier:
                    os.fsync(each)
                if earlier:
                    sync_directory(self._directory)
                os.fsync(file)
            except OSError as error:
                with self._lock:
                    message = self._message("cannot append to the outbox", error)
                raise TrackingError(message) from error
            with self._lock:
                del self._earlier_files[: len(earlier)]
            for _, _, each in earlier:
                os.close(each)

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        with self._sync_lock, self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for file in (*(file for _, _, file in self._earlier_files), self._file):
                os.close(file)

    def _restore_files(self) -> None:
        # Files that the publisher has pruned are not restored.
        pruned_end = read_pruned(self._directory).end if self._earlier_files else None
        for index, (end, path, file) in enumerate(self._earlier_files):
            if pruned_end is not None and end > pruned_end:
                self._earlier_files[index] = (end, path, self._restored(path, file))
        self._file = self._restored(self.path, self._file)

    def _restored(self, path: Path, file: int) -> int:
        """Return the file's descriptor, or that of a new copy if the file is no longer at its path."""
        if not stat.S_ISREG(os.fstat(file).st_mode) or _is_at(path, file):
            return file
        self._directory.mkdir(parents=True, exist_ok=True)
        replacement = path.with_suffix(".new")
        copy = open_private(replacement, _FLAGS | os.O_TRUNC)
        try:
            while content := os.pread(file, 2**20, os.fstat(copy).st_size):
                if os.write(copy, content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(replacement, path)
        except OSError:
            os.close(copy)
            raise
        os.close(file)
        sync_directory(self._directory)
        self.warnings.append(f"{path}: was removed while the run is training; it is restored")
        return copy

    def _is_at_limit(self) -> bool:
        """Whether the journal has its maximum size; reads it again once a second, because the publisher prunes."""
        if self._total_bytes < self._max_bytes:
            self._is_full = False
        elif time.monotonic() >= self._next_check_s:
            self._next_check_s = time.monotonic() + _CHECK_EVERY_S
            with suppress(OSError):
                self._total_bytes = sum(each.end - each.begin for each in list_segments(self._directory))
            self._is_full = self._total_bytes >= self._max_bytes
        return self._is_full

    def _write_pending(self) -> None:
        try:
            while self._pending:
                self._write(self._pending[0])
                self._pending_bytes -= len(self._pending.popleft())
            self._error = None
        except OSError as error:
            self._error = self._error or error  # later errors may only be about truncation

    def _write(self, line: bytes) -> None:
        """Append a whole line, or truncate what was written of it."""
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
            self._is_torn = True  # if the truncation fails too, the next append repeats it
            with suppress(OSError):
                os.ftruncate(self._file, self._size_bytes)
                self._is_torn = False
            raise

    def _begin_segment(self) -> None:
        begin = self._begin + self._size_bytes
        path = segment_path(self._directory, begin)
        file = open_private(path, _FLAGS)
        # `sync` flushes it, because fsync would block the trainer's thread here.
        self._earlier_files.append((begin, self.path, self._file))
        self.path, self._file, self._begin, self._size_bytes = path, file, begin, 0

    def _message(self, what: str, error: OSError) -> str:
        pending = f" ({len(self._pending)} entries are kept in memory)" if self._pending else ""
        return f"{self.path}: {what}: {error.strerror}; free space there{pending}"


def _is_at(path: Path, file: int) -> bool:
    """Whether a path leads to the open file. The link count is no indicator, because NFS renames a removed file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False


def _cut_incomplete_line(path: Path) -> None:
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
