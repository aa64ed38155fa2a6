"""Sources of the bytes of a checkpoint's files. Importing this module never imports torch.

A reader of a checkpoint asks for bytes of a file and does not know who has them: this node's disk, or another rank if
the nodes share no disk (`harness.checkpoint.restore.remote_files`).
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
    """One open file of a checkpoint."""

    def size_bytes(self) -> int:
        """Its length.

        Raises:
            DamagedError: if the file does not exist.
            CheckpointError: if the disk fails.
        """

    def fill(self, part: memoryview, start: int, end: int) -> None:
        """Read `part` from byte `start` on.

        Args:
            part: is filled.
            start: its first byte in the file.
            end: where the caller's sequence of reads ends; bytes up to it may be prefetched.

        Raises:
            DamagedError: if the file ends early or does not exist.
            CheckpointError: if the disk fails.
        """


class Files(Protocol):
    """The files of one directory.

    Attributes:
        directory: its path, also for messages.
        readers: the ranks that read from a disk; None: every rank.
    """

    @property
    def directory(self) -> Path:
        """See above."""

    @property
    def readers(self) -> Sequence[int] | None:
        """See above."""

    def opened(self, name: str) -> AbstractContextManager[OpenFile]:
        """Open one file.

        Raises:
            DamagedError, CheckpointError: as `OpenFile`, either at once or at the first read.
        """

    def reading(self, run: Callable[[], T]) -> T:
        """Call `run`, which reads on this rank, while every other rank does the same. Read only inside of it."""


class LocalFiles:
    """Files that this rank reads from its own disk.

    Effects: not collective; any thread; blocks for reading; nothing on disk.
    """

    readers: Sequence[int] | None = None

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        """See `Files.opened`."""
        path = self.directory / name
        try:
            descriptor = _open_regular(path)
        except OSError as error:
            raise read_error(path, error) from error
        except ValueError as error:
            raise DamagedError(f"{path}: {error}; use another checkpoint") from error
        try:
            if sys.platform == "linux":
                # A rank reads pieces with gaps, ahead of which the kernel would not read by itself.
                with suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield _LocalFile(path, descriptor)
        finally:
            os.close(descriptor)

    def reading(self, run: Callable[[], T]) -> T:
        """See `Files.reading`: no other rank is involved."""
        return run()


class _LocalFile:
    # `pread` rather than a memory map: a bad page or a file that is truncated meanwhile raises an error here instead
    # of SIGBUS, and the bytes do not count as memory of this process.

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
    """All bytes of a file.

    Raises:
        OSError: if it cannot be opened or read.
        ValueError: if it is not a regular file.
    """
    with open(_open_regular(path), "rb") as stream:
        return stream.read()


def _open_regular(path: Path) -> int:
    # O_NONBLOCK: opening a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is not a file")
    return descriptor


def read_error(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that cannot be read: a missing file is damage, a failing disk is not."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return DamagedError(f"{path}: {error.strerror}; use another checkpoint")
    return CheckpointError(f"{path}: cannot be read: {error.strerror}; check the disk and start again")
