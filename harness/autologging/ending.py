"""How a script ends, seen from within its process: by itself, by an error, or by an exit code.

an error        sys.excepthook
an exit code    exit_codes: the interpreter tells nobody what it is exited with
by itself       atexit, where it was neither of them
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from harness.autologging.exit_codes import ExitCodes
from harness.errors import EXIT_FAILED, HarnessError


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
        self._earlier_hook: Any = None
        self._codes = ExitCodes()

    def watch(self) -> None:
        """Watch for the end."""
        atexit.register(self._at_exit)
        self._earlier_hook, sys.excepthook = sys.excepthook, self._hook
        self._codes.watch()

    def begins(self) -> None:
        """A training begins."""
        self._codes.forget()

    def leave(self) -> None:
        """Watch no longer."""
        atexit.unregister(self._at_exit)
        if sys.excepthook == self._hook:
            sys.excepthook = self._earlier_hook
        self._codes.leave()

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == self._pid:
            self._fail(error)
        self._earlier_hook(kind, error, trace)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self._ended(self._codes.failure())

    def _ended(self, failure: BaseException | None) -> None:
        if failure is not None:
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
