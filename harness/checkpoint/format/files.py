"""Read the bytes of a checkpoint's files. This module never imports torch.

The bytes come from the local disk, or from another rank if the nodes share no disk
(`harness.checkpoint.restore.remote_files`).
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from harness.errors import CheckpointError, DamagedError

T = TypeVar("T")


class OpenFile(Protocol):
    """Read one open file of a checkpoint."""

    def size_bytes(self) -> int:
        """Return the length of the file.

        Raises:
            DamagedError: if the file does not exist.
            CheckpointError: if the disk fails.
        """

    def fill(self, part: memoryview, start: int, end: int) -> None:
        """Fill `part` with the file's bytes from `start`. Bytes up to `end` may be prefetched for later calls.

        Raises:
            DamagedError: if the file ends early or does not exist.
            CheckpointError: if the disk fails.
        """


class Files(Protocol):
    """Open the files of one directory."""

    @property
    def directory(self) -> Path:
        """Return the path of the directory, which messages name."""

    @property
    def readers(self) -> Sequence[int] | None:
        """Return the ranks that read from a disk; None if every rank does."""

    def opened(self, name: str) -> AbstractContextManager[OpenFile]:
        """Open one file. The errors of `OpenFile` are raised here or at the first read."""

    def reading(self, run: Callable[[], T]) -> T:
        """Call `run`, the only place where files may be read. Every rank calls this at the same time."""


class LocalFiles:
    """Read files from the local disk. Not collective; any thread."""

    readers: Sequence[int] | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        """Implement `Files.opened`."""
        path = self.directory / name
        try:
            descriptor = _open_regular(path)
        except OSError as error:
            raise read_error(path, error) from error
        except ValueError as error:
            raise DamagedError(f"{path}: {error}; use another checkpoint") from error
        try:
            if sys.platform == "linux":
                # A rank reads ranges with gaps, which the kernel would not prefetch by default.
                with suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield _LocalFile(path, descriptor)
        finally:
            os.close(descriptor)

    def reading(self, run: Callable[[], T]) -> T:
        """Implement `Files.reading` without communication."""
        return run()


class _LocalFile:
    # `pread`, not a memory map: a bad page or a concurrent truncation raises an error instead of SIGBUS, and the bytes
    # do not count as memory of this process.

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def size_bytes(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise read_error(self._path, error) from error

    def fill(self, part: memoryview, start: int, end: int) -> None:
        position = 0
        while position < len(part):
            try:
                count = os.preadv(self._descriptor, [part[position:]], start + position)
            except OSError as error:
                raise read_error(self._path, error) from error
            if not count:
                raise DamagedError(f"{self._path}: ends at byte {start + position}; use another checkpoint")
            position += count


def read_file(path: Path) -> bytes:
    """Return all bytes of a file.

    Raises:
        OSError: if it cannot be opened or read.
        ValueError: if it is not a regular file.
    """
    with open(_open_regular(path), "rb") as stream:
        return stream.read()


def _open_regular(path: Path) -> int:
    # Without O_NONBLOCK, opening a pipe blocks until its other end is opened.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is not a file")
    return descriptor


def read_error(path: Path, error: OSError) -> CheckpointError:
    """Return the error for an unreadable file: `DamagedError` if it is missing, otherwise `CheckpointError`."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return DamagedError(f"{path}: {error.strerror}; use another checkpoint")
    return CheckpointError(f"{path}: cannot be read: {error.strerror}; check the disk and start again")
