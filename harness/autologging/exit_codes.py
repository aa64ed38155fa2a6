"""With which exit code a script ends: `SystemExit` reaches no hook of the interpreter's.

Python 3.12 on   `sys.monitoring` sees what the outermost frame is left with, whoever has raised it
before           `sys.exit`, `exit` and `quit` say what they were called with, and the outermost frame whether it
                 has returned: then that was caught, or was another thread's
"""

from __future__ import annotations

import dis
import sys
import threading
from types import CodeType, FrameType
from typing import Any

from harness.autologging.replacements import Replacement, Replacements
from harness.errors import EXIT_REQUEUE, Stopped


class ExitCodeError(Exception):
    """The script has ended with an exit code that says that it failed."""


def failure_of(exit: SystemExit) -> BaseException | None:
    """What an exit means for a run; None: it is in good order."""
    code = exit.code
    if code in (None, 0):
        return None
    if code == EXIT_REQUEUE:
        return Stopped(f"exit code {code}")
    if not isinstance(code, int):
        return ExitCodeError(str(code))
    handled = exit.__context__
    # A number says less than the error does in whose handling it was chosen, as in torch's launchers.
    return handled if isinstance(handled, (Exception, KeyboardInterrupt)) else ExitCodeError(f"exit code {code}")


class ExitCodes:
    """Sees the exit that ends the process.

    Effects: not collective; main thread; nothing on disk. From Python 3.12 on each exception that leaves a function
    costs a call, and before that `sys.exit`, `exit` and `quit` are replaced, until `leave`.
    """

    def __init__(self) -> None:
        self._outermost: FrameType | None = None
        self._failure: BaseException | None = None
        self._tool: int | None = None
        self._calls = Replacements(
            [
                Replacement(module, name, "the exit code", self._called)
                for module, name in (("sys", "exit"), ("builtins", "exit"), ("builtins", "quit"))
            ]
        )

    def watch(self) -> None:
        """Watch for exits."""
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
        self._outermost = frame
        if not self._monitor():
            self._calls.put()

    def forget(self) -> None:
        """What was seen until now has ended nothing: the script goes on."""
        self._failure = None

    def leave(self) -> None:
        """Watch no longer."""
        self._calls.take_away()
        if sys.version_info >= (3, 12) and self._tool is not None:
            sys.monitoring.set_events(self._tool, sys.monitoring.events.NO_EVENTS)
            sys.monitoring.register_callback(self._tool, sys.monitoring.events.PY_UNWIND, None)
            sys.monitoring.free_tool_id(self._tool)
            self._tool = None
        self._outermost = self._failure = None

    def failure(self) -> BaseException | None:
        """What the process's exit means for a run, at its end; None: it is in good order, or was not seen."""
        return None if self._has_returned else self._failure

    @property
    def _has_returned(self) -> bool:
        frame = self._outermost
        assert frame is not None
        return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")

    def _called(self, original: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except SystemExit as exit:
            if threading.current_thread() is threading.main_thread():
                self._failure = failure_of(exit)
            raise

    def _monitor(self) -> bool:
        """Whether what leaves the outermost frame is seen."""
        if sys.version_info >= (3, 12):
            events = sys.monitoring.events
            # The two that are nobody's by convention.
            free = [tool for tool in (4, 3) if sys.monitoring.get_tool(tool) is None]
            if free:
                self._tool = free[0]
                sys.monitoring.use_tool_id(self._tool, "harness")
                sys.monitoring.register_callback(self._tool, events.PY_UNWIND, self._unwound)
                sys.monitoring.set_events(self._tool, events.PY_UNWIND)
                return True
        return False

    def _unwound(self, code: CodeType, offset: int, error: BaseException) -> None:
        assert self._outermost is not None
        if code is self._outermost.f_code and isinstance(error, SystemExit):
            self._failure = failure_of(error)
