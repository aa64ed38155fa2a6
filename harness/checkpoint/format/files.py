"""Where the bytes of a checkpoint's files come from. Importing this never imports torch.

What reads a checkpoint asks for bytes of a file and does not know who has it: this node's disk, as here, or
another rank, where the nodes share none (`harness.checkpoint.restore.remote_files`).
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

from harness.checkpoint.format.commit import unreadable
from harness.errors import DamagedError

T = TypeVar("T")


class OpenFile(Protocol):
    """One file of a checkpoint, open."""

    def size_bytes(self) -> int:
        """Its length.

        Raises:
            DamagedError: if there is no such file.
            CheckpointError: if the disk does not tell.
        """

    def fill(self, part: memoryview, start: int, end: int) -> None:
        """Read what `part` holds of the file, from byte `start` on.

        Args:
            part: is filled.
            start: its first byte in the file.
            end: up to where the caller goes on to read: what may be fetched ahead.

        Raises:
            DamagedError: if the file ends before that, or is not there.
            CheckpointError: if the disk does not give it.
        """


class Files(Protocol):
    """The files of one directory.

    Attributes:
        directory: what it is called, in messages too.
        readers: the ranks that have a disk to read from; None: every rank.
    """

    @property
    def directory(self) -> Path:
        """See above."""

    @property
    def readers(self) -> Sequence[int] | None:
        """See above."""

    def opened(self, name: str) -> AbstractContextManager[OpenFile]:
        """Open one of them.

        Raises:
            DamagedError, CheckpointError: as `OpenFile`'s, at once or when it is read.
        """

    def reading(self, run: Callable[[], T]) -> T:
        """Run what reads on this rank, while every rank runs what reads on it. Outside of it nothing is read."""


class LocalFiles:
    """Files that this rank reads itself.

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
            # Not to wait for whoever would write into a pipe.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise unreadable(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise DamagedError(f"{path}: is not a file; use another checkpoint")
            if sys.platform == "linux":
                # What a rank of several wants comes in pieces, which the kernel would not read ahead of.
                with suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            yield _LocalFile(path, descriptor)
        finally:
            os.close(descriptor)

    def reading(self, run: Callable[[], T]) -> T:
        """See `Files.reading`: nobody else is needed."""
        return run()


class _LocalFile:
    # `pread` and not a memory map: a page that cannot be read, or a file that is cut off meanwhile, is an error
    # here and not a SIGBUS, and what has been read does not count as this process's memory.

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def size_bytes(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise unreadable(self._path, error) from error

    def fill(self, part: memoryview, start: int, end: int) -> None:
        position = 0
        while position < len(part):
            try:
                count = os.preadv(self._descriptor, [part[position:]], start + position)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if not count:
                raise DamagedError(f"{self._path}: ends at byte {start + position}; use another checkpoint")
            position += count
