"""Standard output and error where they are closed, or their reader is gone: what is written there is dropped.

Supervisors and daemons start processes so, `| head` ends before its writer, and a terminal is hung up. None of that
is a reason for a training to end, or for its exit code.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NUM_DESCRIPTORS = 3


def occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 on the null device where they are closed.

    The next file that is opened, a checkpoint, say, would have one of these numbers otherwise: what a library prints
    would land in it, and a child process would have it replaced.

    Effects: not collective; any thread; `sys.stdin`, `sys.stdout` and `sys.stderr` stay as they are.
    """
    for descriptor in range(_NUM_DESCRIPTORS):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free is taken: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def flush() -> None:
    """Flush both. What one of them does not take is dropped, so that the interpreter's end does not fail with it."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def write_output(text: str) -> None:
    """Write to standard output and flush both, or drop it; what this process starts or becomes may write next."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            sys.stdout.write(text)
    flush()


def write_error(text: str) -> None:
    """Write to standard error."""
    StandardError().write(text)


class StandardError:
    """Standard error, whatever it is when it is written to: a file for `rich.console.Console`."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Write, or drop it."""
        stream = self._stream()
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, where there is something to flush."""
        stream = self._stream()
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        stream = self._stream()
        with suppress(OSError, ValueError):
            return stream is not None and bool(stream.isatty())
        return False

    @staticmethod
    def _stream() -> Any:
        # While rich shows a bar, `sys.stderr` leads to the console, which writes here.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)
