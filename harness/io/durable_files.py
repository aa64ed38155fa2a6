"""Write files so that readers see either the old or the new content, even after a crash."""

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
    """Replace the content of a file atomically.

    A private file has mode 0600, for content such as addresses. For other files the umask applies.

    Effects: not collective; any thread; blocks on fsync; leaves the complete file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # It may be the file of an earlier process with this id, or a link that another user of the directory created.
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
    """Open a file and set its mode to 0600, as an opener for `open`.

    A link is not followed, because in a directory that a group can write to it may lead to any file of this user.
    Parent directories may be links.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would block until its other end is open; files are not affected.
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
        # Fails for a file of another user and on a file system without modes.
        with suppress(OSError):
            os.fchmod(descriptor, 0o600)
    return descriptor


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or damaged (empty, truncated, not an object)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def parse_record(path: Path, parse: Callable[[dict[str, Any]], T]) -> T | None:
    """Parse the JSON object in a file; None if the file is missing or damaged, or lacks a field."""
    record = read_record(path)
    try:
        return None if record is None else parse(record)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def sync_directory(directory: Path) -> None:
    """Block until the directory's entries (new names, renames) are on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
