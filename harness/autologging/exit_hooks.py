"""Observe how a script ends: normally, with an error, or with an exit code.

    an error        `sys.excepthook`
    an exit code    `ExitCodes`: no hook of the interpreter receives `SystemExit`
    normally        `atexit`, if neither of them was seen
    a child         the finalizers of multiprocessing, if the training began in one of its processes: a forked process
                    runs neither hooks nor `atexit` functions at its end

How `ExitCodes` sees an exit code:

    Python 3.12 on  `sys.monitoring` reports any exception that leaves the outermost frame
    before          `sys.exit`, `exit` and `quit` are replaced. If the outermost frame has returned, the exit was
                    caught, or ended another thread
"""

from __future__ import annotations

import atexit
import dis
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing.util import Finalize
from types import CodeType, FrameType, TracebackType
from typing import Any, Protocol

from harness.autologging.replacements import Replacement, Replacements
from harness.errors import EXIT_FAILED, EXIT_REQUEUE, HarnessError, Stopped
from harness.io.standard_streams import flush, write_error

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class MayFail(Protocol):
    """Is notified of an error."""

    def fail(self, error: BaseException) -> BaseException:
        """The training has failed; returns the error that is shown to the user."""


class MayEnd(MayFail, Protocol):
    """Is notified of either end."""

    def finish(self) -> None:
        """The training has ended normally."""


class ExceptHook:
    """Notifies a training of the exception that ends the process, through `sys.excepthook`.

    Effects: replaces `sys.excepthook` until `remove`. The hook runs in the main thread.
    """

    def __init__(self) -> None:
        self._hook: Hook | None = None
        self._earlier: Hook = sys.excepthook

    def install(self, training: MayFail) -> None:
        """Start to notify a training."""
        earlier = sys.excepthook

        # Make one function per installation, since code that wrapped an earlier one still calls it.
        def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            shown = training.fail(error) if self._hook is hook else error
            if shown is error:
                earlier(kind, error, trace)
                return
            # The error follows from another rank's failure, which is printed last.
            shown.__cause__ = error
            earlier(type(shown), shown, shown.__traceback__)

        self._hook, self._earlier = hook, earlier
        sys.excepthook = hook

    def remove(self) -> None:
        """Restore the earlier hook, unless other code has wrapped this one."""
        if self._hook is not None and sys.excepthook is self._hook:
            sys.excepthook = self._earlier
        self._hook = None


class ExitHooks:
    """Notifies a training of the end of the script.

    Effects: notifies in the main thread of the process in which the latest training has begun, and not in processes
    forked from it. `harness run` observes the end of the script and notifies by itself; the first notification counts.
    """

    def __init__(self) -> None:
        self._training: MayEnd | None = None
        self._pid = os.getpid()
        self._except_hook = ExceptHook()
        self._codes = ExitCodes()
        self._child_finalizer: Any = None

    def install(self, training: MayEnd) -> None:
        """Start to notify a training."""
        self._training = training
        atexit.register(self._at_exit)
        self._except_hook.install(self)
        self._codes.install()

    def training_begins(self) -> None:
        """Record that a training begins in this process, perhaps a child of the process with the hooks."""
        if multiprocessing.parent_process() is not None and (self._child_finalizer is None or not self._is_own_process):
            # Run first, since other finalizers may close what a save or the delivery uses.
            self._child_finalizer = Finalize(None, self._child_ends, exitpriority=sys.maxsize)
        self._pid = os.getpid()
        self._codes.forget()

    def remove(self) -> None:
        """Stop notifying."""
        atexit.unregister(self._at_exit)
        self._except_hook.remove()
        self._codes.remove()
        if self._child_finalizer is not None:
            self._child_finalizer.cancel()
            self._child_finalizer = None

    @property
    def _is_own_process(self) -> bool:
        return os.getpid() == self._pid

    def finish(self) -> None:
        """Notify of a normal end. An error of the last checkpoint ends the process with exit code 1."""
        assert self._training is not None
        try:
            self._training.finish()
        except HarnessError as error:
            write_error(f"harness: error: {error}\n")
            flush()
            # An exception raised here would not change the exit code.
            os._exit(EXIT_FAILED)

    def fail(self, error: BaseException) -> BaseException:
        """Notify of an error; returns it unchanged, as it is shown to the user."""
        if self._training is not None and self._is_own_process:
            self._training.fail(error)
        return error

    def _at_exit(self) -> None:
        if self._is_own_process:
            self._end(self._codes.failure())

    def _child_ends(self) -> None:
        error = _error_that_ends_child()
        self._end(failure_of(error) if isinstance(error, SystemExit) else error)

    def _end(self, failure: BaseException | None) -> None:
        if failure is None:
            self.finish()
        else:
            self.fail(failure)


def _error_that_ends_child() -> BaseException | None:
    """Return the exception that ends a child of multiprocessing, which is in flight while its finalizers run."""
    error = sys.exc_info()[1]
    # The traceback of an error that the parent was handling at the fork begins in the parent's frames.
    trace = None if error is None else error.__traceback__
    return error if trace is not None and trace.tb_frame.f_code.co_name == "_bootstrap" else None


# ------------------------------------------------------------------------------ exit codes


class ExitCodeError(Exception):
    """The script ended with a failing exit code."""


def failure_of(exit: SystemExit) -> BaseException | None:
    """Return the failure that an exit means for a run; None for an exit without a failure."""
    code = exit.code
    if code in (None, 0):
        return None
    if code == EXIT_REQUEUE:
        return Stopped(f"exit code {code}")
    if not isinstance(code, int):
        return ExitCodeError(str(code))
    handled = exit.__context__
    # The error whose handling chose the code, as in torch's launchers, is more informative than the number.
    return handled if isinstance(handled, (Exception, KeyboardInterrupt)) else ExitCodeError(f"exit code {code}")


class ExitCodes:
    """Observes the exit that ends the process.

    Effects: not collective; main thread; nothing on disk. From Python 3.12 on, each exception that leaves a function
    costs a call. Before, `sys.exit`, `exit` and `quit` are replaced until `remove`.
    """

    def __init__(self) -> None:
        self._outermost: FrameType | None = None
        self._failure: BaseException | None = None
        self._tool: int | None = None
        self._exit_functions = Replacements(
            [
                Replacement(module, name, "the exit code", self._exit_called)
                for module, name in (("sys", "exit"), ("builtins", "exit"), ("builtins", "quit"))
            ]
        )

    def install(self) -> None:
        """Start to observe exits."""
        frame = sys._getframe()
        while frame.f_back is not None:
            frame = frame.f_back
        self._outermost = frame
        if not self._monitor():
            self._exit_functions.install()

    def forget(self) -> None:
        """Forget the exits so far, since the script is still running."""
        self._failure = None

    def remove(self) -> None:
        """Stop observing."""
        self._exit_functions.remove()
        if sys.version_info >= (3, 12) and self._tool is not None:
            sys.monitoring.set_events(self._tool, sys.monitoring.events.NO_EVENTS)
            sys.monitoring.register_callback(self._tool, sys.monitoring.events.PY_UNWIND, None)
            sys.monitoring.free_tool_id(self._tool)
            self._tool = None
        self._outermost = self._failure = None

    def failure(self) -> BaseException | None:
        """Return the failure that the process's exit means; None without a failure, or if no exit was seen."""
        return None if self._has_returned else self._failure

    @property
    def _has_returned(self) -> bool:
        frame = self._outermost
        assert frame is not None
        return dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("RETURN_")

    def _exit_called(self, original: Any, *args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except SystemExit as exit:
            if threading.current_thread() is threading.main_thread():
                self._failure = failure_of(exit)
            raise

    def _monitor(self) -> bool:
        """Register with `sys.monitoring`; False if Python lacks it, or no tool id is free."""
        if sys.version_info >= (3, 12):
            events = sys.monitoring.events
            # These two ids have no purpose by convention.
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
