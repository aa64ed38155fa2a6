"""How a script ends, seen from within its process: by itself, by an error, or by an exit code."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from harness.errors import EXIT_FAILED, HarnessError


class ExitCodeError(Exception):
    """The script has ended with an exit code that says that it failed."""


def failure_of(code: Any) -> BaseException | None:
    """What an exit's code means for a run; None: it is in good order."""
    if code in (None, 0):
        return None
    return ExitCodeError(f"exit code {code}" if isinstance(code, int) else str(code))


class Ending:
    """Calls back when the script ends.

    Effects: the calls come in the main thread of this process, not of one that was forked from it. `harness run`,
    which sees the script end, calls back by itself, and the first call counts.

    Args:
        finish: called when it ends by itself.
        fail: called with what ended it.
    """

    def __init__(self, finish: Callable[[], None], fail: Callable[[BaseException], BaseException]) -> None:
        self._finish = finish
        self._fail = fail
        self._pid = os.getpid()
        self._code: Any = None
        self._earlier_hook: Any = None
        self._earlier_exit: Any = None

    def watch(self) -> None:
        """Watch for the end."""
        atexit.register(self._at_exit)
        self._earlier_hook, sys.excepthook = sys.excepthook, self._hook
        # The interpreter tells nobody what it was exited with.
        self._earlier_exit, sys.exit = sys.exit, self._exit  # type: ignore[assignment]

    def leave(self) -> None:
        """Watch no longer."""
        atexit.unregister(self._at_exit)
        if sys.excepthook == self._hook:
            sys.excepthook = self._earlier_hook
        if sys.exit == self._exit:
            sys.exit = self._earlier_exit

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == self._pid:
            self._fail(error)
        self._earlier_hook(kind, error, trace)

    def _exit(self, code: Any = None) -> None:
        self._code = code
        self._earlier_exit(code)

    def _at_exit(self) -> None:
        if os.getpid() != self._pid:
            return
        if (failure := failure_of(self._code)) is not None:
            self._fail(failure)
            return
        try:
            self._finish()
        except HarnessError as error:
            sys.stderr.write(f"harness: error: {error}\n")
            sys.stdout.flush()
            sys.stderr.flush()
            # An error here changes the process's code in no other way.
            os._exit(EXIT_FAILED)
