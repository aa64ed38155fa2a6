"""Writing so that a reader, or a power cut, finds the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def replace_file(path: Path, text: str, *, is_private: bool = False) -> None:
    """Put `text` in `path` in one step.

    Effects: not collective; any thread; blocks on fsync; leaves `path`, whole.

    Args:
        path: of the file.
        text: all that it shall hold.
        is_private: its user alone can read it (mode 0600), as where it holds addresses; else as the umask has it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Of an earlier process with this number, or a link that another user of the directory has put there.
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "x", encoding="utf-8", opener=open_private if is_private else None) as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def open_private(path: str | os.PathLike[str], flags: int) -> int:
    """An opener for `open`: a file that its user alone can read. One that is there already becomes so.

    A link is not followed: in a directory that a group can write to, it may lead to any file of this user's.
    Directories on the way may be links.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end; files are not affected.
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise OSError(error.errno, "is a link or no regular file, and is not opened", os.fspath(path)) from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file, and is not opened", os.fspath(path))
    if status.st_mode & 0o077:
        # Another user's stays as it is, and so does one on a file system without modes.
        with suppress(OSError):
            os.fchmod(descriptor, 0o600)
    return descriptor


def read_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or it is damaged (empty, cut, or something else)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def parse_record(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Parse the JSON object in a file; None if there is no file, or if it is damaged or lacks a field."""
    record = read_record(path)
    try:
        return None if record is None else parse(record)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def sync_directory(directory: Path) -> None:
    """Wait until the directory's entries (new names, renames) are on the disk itself."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
