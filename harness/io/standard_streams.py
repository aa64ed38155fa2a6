"""Write to standard output and error, and drop the text if they are closed or their reader is gone.

Supervisors and daemons start processes with closed streams, `| head` ends before its writer, and terminals hang up.
None of these may end the training or change its exit code.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

_NUM_DESCRIPTORS = 3


def occupy_descriptors() -> None:
    """Open each closed descriptor of 0, 1 and 2 on the null device.

    Otherwise the next file that is opened, such as a checkpoint, would get its number, and libraries would print into
    that file.

    Effects: not collective; any thread; does not change `sys.stdin`, `sys.stdout` and `sys.stderr`.
    """
    for descriptor in range(_NUM_DESCRIPTORS):
        try:
            os.fstat(descriptor)
        except OSError:
            # `open` uses the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def flush() -> None:
    """Flush both streams and drop text that cannot be written, on which the interpreter's shutdown would fail."""
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
    """Write to standard output, if possible, and flush both streams, because a child process may write next."""
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
        # While rich draws a bar, `sys.stderr` writes to the console, which writes to this stream.
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)
