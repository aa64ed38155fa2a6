"""Signals that ask a run to stop, or to save. The handlers only set a flag; the loop looks at it between steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

from harness.errors import Stopped

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Not USR1, which batch systems send ahead of a time limit.
_SAVE_SIGNAL = signal.SIGUSR2


class StopSignals:
    """Installs handlers for SIGTERM, SIGINT and SIGUSR2 (save now), and puts the earlier ones back.

    Effects: not collective; main thread (elsewhere nothing is installed); never blocks.
    A second SIGINT raises KeyboardInterrupt wherever the main thread is.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._save_is_asked = False
        self._earlier: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._handle)
            self._earlier[_SAVE_SIGNAL] = signal.signal(_SAVE_SIGNAL, self._ask_for_save)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number).name
        if number == signal.SIGINT and sys.stderr is not None:
            sys.stderr.write("harness: stopping after this step; once more to stop at once\n")

    def _ask_for_save(self, number: int, frame: FrameType | None) -> None:
        self._save_is_asked = True

    def take_save_request(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self._save_is_asked = self._save_is_asked, False
        return asked

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self._received is not None

    def check(self) -> None:
        """Raise if a signal has come. Costs one attribute.

        Raises:
            Stopped: with the signal's name.
        """
        if self._received is not None:
            raise Stopped(self._received)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._earlier.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be from here
                signal.signal(number, handler)
        self._earlier = {}
