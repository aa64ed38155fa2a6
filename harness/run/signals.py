"""Signals that ask a run to stop or to save. The handlers only set a flag, which the loop reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from harness.io.standard_streams import write_error

# Batch systems send SIGUSR1 ahead of a time limit.
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SAVE_SIGNAL = signal.SIGUSR2
# Stands for `harness stop` in place of a signal's number.
STOP_REQUEST = 128


def name_of(number: int) -> str:
    """Return the user's name for the source of a stop request."""
    return "harness stop" if number == STOP_REQUEST else signal.Signals(number).name


class StopSignals:
    """Install handlers for SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 (save now), and restore the earlier ones.

    Handlers of the script or of its launcher are called too, after the signal is recorded. One that is installed later
    is chained at the next call of `chain`.

    Effects: not collective; main thread (no handler is installed on any other); never blocks. A second SIGINT raises
    KeyboardInterrupt wherever the main thread is.

    Attributes:
        received: number of the signal that asked to stop; 0 without one.
        is_save_requested: whether SIGUSR2 was received since the last `pop_save_request`.
    """

    def __init__(self) -> None:
        self.received = 0
        self.is_save_requested = False
        self._is_installed = threading.current_thread() is threading.main_thread()
        # Signals being handled: the script's handler may call the one that it replaced, which is one of these.
        self._handling: set[int] = set()
        self.chain()

    def chain(self) -> None:
        """Install the handlers in front of those that the script has installed since the last call."""
        if not self._is_installed or threading.current_thread() is not threading.main_thread():
            return
        for number in (*_SIGNALS, _SAVE_SIGNAL):
            theirs = signal.getsignal(number)
            if not self._is_ours(theirs):
                signal.signal(number, _Handler(self, theirs))

    def handle(self, number: int, frame: FrameType | None, theirs: Any) -> None:
        """Record a signal and call the handler that was installed before."""
        if number in self._handling:
            self._call(theirs, number, frame)
            return
        self._handling.add(number)
        try:
            self._note(number)
            self._call(theirs, number, frame)
        finally:
            self._handling.discard(number)

    def _note(self, number: int) -> None:
        if number == _SAVE_SIGNAL:
            self.is_save_requested = True
            return
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = int(number)
        if number == signal.SIGINT:
            write_error("harness: stopping after this step; once more to stop at once\n")

    @staticmethod
    def _call(theirs: Any, number: int, frame: FrameType | None) -> None:
        # Python's own SIGINT handler would interrupt the step that is to be completed.
        if callable(theirs) and theirs is not signal.default_int_handler:
            theirs(number, frame)

    def _is_ours(self, handler: Any) -> bool:
        return isinstance(handler, _Handler) and handler.signals is self

    def pop_save_request(self) -> bool:
        """Return whether a save was requested since the last call."""
        asked, self.is_save_requested = self.is_save_requested, False
        return asked

    @property
    def is_set(self) -> bool:
        """Whether a signal to stop was received."""
        return self.received != 0

    def restore(self) -> None:
        """Restore the earlier handlers, except where the script has installed its own since."""
        if not self._is_installed:
            return
        self._is_installed = False
        for number in (*_SIGNALS, _SAVE_SIGNAL):
            while isinstance(handler := signal.getsignal(number), _Handler) and self._is_ours(handler):
                # A handler that was not installed from Python reads as None and cannot be restored.
                signal.signal(number, signal.SIG_DFL if handler.theirs is None else handler.theirs)


class _Handler:
    """A signal handler with its owner and the handler that it replaced."""

    def __init__(self, signals: StopSignals, theirs: Any) -> None:
        self.signals = signals
        self.theirs = theirs

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.signals.handle(number, frame, self.theirs)
