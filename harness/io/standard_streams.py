"""Write to standard output and error, and drop the text if they are closed or their reader is gone.

Supervisors and daemons start processes with closed streams, `| head` ends before its writer, and terminals hang up.
None of these may end a training or change its exit code.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NUM_DESCRIPTORS = 3


def occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 on the null device where they are closed.

    Otherwise the next file that is opened, such as a checkpoint, would get one of these numbers, and libraries would
    print into it.

    Effects: not collective; any thread; `sys.stdin`, `sys.stdout` and `sys.stderr` stay as they are.
    """
    for descriptor in range(_NUM_DESCRIPTORS):
        try:
            os.fstat(descriptor)
        except OSError:
            # `open` uses the lowest free number: this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def flush() -> None:
    """Flush both, and drop what cannot be written, so that the interpreter's shutdown does not fail with it."""
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
    """Write to standard output, if possible, and flush both, because a child process may write next."""
    if sys.stdout is not None:
        with suppress(OSError, ValueError):
            sys.stdout.write(text)
    flush()


def write_error(text: str) -> None:
    """Write to standard error."""
    StandardError().write(text)


class StandardError:
    """The current standard error, as a file for `rich.console.Console`."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        """Write the text, or drop it."""
        stream = self._stream()
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if possible."""
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
        # While rich draws a bar, `sys.stderr` writes to the console, which writes here.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)
