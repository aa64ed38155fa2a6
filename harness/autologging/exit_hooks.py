"""How a script ends, seen from within its process: by itself, by an error, or by an exit code.

an error        sys.excepthook
an exit code    exit_codes: the interpreter tells nobody what it is exited with
by itself       atexit, where it was neither of them
a child         multiprocessing's finalizers, where the training has begun in a process of its kind: neither
                hooks nor atexit functions run at the end of one that was forked
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.util import Finalize
from types import TracebackType
from typing import Any

from harness.autologging.exit_codes import ExitCodes, failure_of
from harness.errors import EXIT_FAILED, HarnessError
from harness.io.standard_streams import flush, write_error


class ExitHooks:
    """Calls back when the script ends.

    Effects: the calls come in the main thread of the process in which the latest training has begun; of one that was
    forked from it, never. `harness run`, which sees the script end, calls back by itself, and the first call counts.

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
        self._of_child: Any = None

    def watch(self) -> None:
        """Watch for the end."""
        atexit.register(self._at_exit)
        self._earlier_hook, sys.excepthook = sys.excepthook, self._hook
        self._codes.watch()

    def begins(self) -> None:
        """A training begins in this process, which may be a child of the one that was watched."""
        if multiprocessing.parent_process() is not None and (self._of_child is None or self._pid != os.getpid()):
            # Before its other finalizers: what a save or the delivery uses may be among those.
            self._of_child = Finalize(None, self._child_ends, exitpriority=sys.maxsize)
        self._pid = os.getpid()
        self._codes.forget()

    def leave(self) -> None:
        """Watch no longer."""
        atexit.unregister(self._at_exit)
        if sys.excepthook == self._hook:
            sys.excepthook = self._earlier_hook
        self._codes.leave()
        if self._of_child is not None:
            self._of_child.cancel()
            self._of_child = None

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.getpid() == self._pid:
            self._fail(error)
        self._earlier_hook(kind, error, trace)

    def _at_exit(self) -> None:
        if os.getpid() == self._pid:
            self._ended(self._codes.failure())

    def _child_ends(self) -> None:
        error = _in_flight()
        self._ended(failure_of(error) if isinstance(error, SystemExit) else error)

    def _ended(self, failure: BaseException | None) -> None:
        if failure is not None:
            self._fail(failure)
            return
        try:
            self._finish()
        except HarnessError as error:
            write_error(f"harness: error: {error}\n")
            flush()
            # An error here changes the process's code in no other way.
            os._exit(EXIT_FAILED)


def _in_flight() -> BaseException | None:
    """What ends a child of multiprocessing, whose finalizers run while that goes by."""
    error = sys.exc_info()[1]
    # Not what its parent was handling when it forked: that has come through the parent's own frames.
    trace = None if error is None else error.__traceback__
    return error if trace is not None and trace.tb_frame.f_code.co_name == "_bootstrap" else None
