"""Signals that ask a run to stop, or to save. The handlers only set a flag; the loop looks at it between steps."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

# USR1 is what batch systems send ahead of a time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAVE_SIGNAL = signal.SIGUSR2
# Stands where a signal's number does: `harness stop` has asked.
STOP_REQUEST = 128


def name_of(number: int) -> str:
    """What asked for a stop, in its user's words."""
    return "harness stop" if number == STOP_REQUEST else signal.Signals(number).name


class StopSignals:
    """Installs handlers for SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (save now), and puts the earlier ones back.

    Effects: not collective; main thread (elsewhere nothing is installed); never blocks.
    A second SIGINT raises KeyboardInterrupt wherever the main thread is.

    Attributes:
        received: number of the signal that asked to stop; 0: none has.
        save_is_asked: whether SIGUSR2 has come since `take_save_request`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.save_is_asked = False
        self._earlier: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._earlier[number] = signal.signal(number, self._handle)
            self._earlier[_SAVE_SIGNAL] = signal.signal(_SAVE_SIGNAL, self._ask_for_save)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = int(number)
        if number == signal.SIGINT and sys.stderr is not None:
            sys.stderr.write("harness: stopping after this step; once more to stop at once\n")

    def _ask_for_save(self, number: int, frame: FrameType | None) -> None:
        self.save_is_asked = True

    def take_save_request(self) -> bool:
        """Whether a save was asked for since the last call."""
        asked, self.save_is_asked = self.save_is_asked, False
        return asked

    @property
    def is_set(self) -> bool:
        """Whether a signal has come."""
        return self.received != 0

    def restore(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._earlier.items():
            if handler is not None:  # None: it was not installed from Python, and cannot be from here
                signal.signal(number, handler)
        self._earlier = {}
