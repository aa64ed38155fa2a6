"""The end of a script, or of a child that it has started, and the exit code that it ends with."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.autologging.exit_hooks import ExceptHook

HOOKS = """
import multiprocessing, sys
from harness.autologging.exit_hooks import ExitHooks

class Training:
    def finish(self):
        print("finished", flush=True)

    def fail(self, error):
        print(repr(error), flush=True)
        return error

hooks = ExitHooks()
hooks.install(Training())

def train(end=None):
    hooks.training_begins()
    if isinstance(end, BaseException):
        raise end

def in_child(end=None):
    child = multiprocessing.get_context("fork").Process(target=train, args=(end,))
    child.start()
    child.join()

"""
WITHIN_HANDLING = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    in_child()"


@pytest.mark.parametrize(
    ("script", "notified"),
    [
        ("train()", ["finished"]),
        # Each end is notified; the training counts the first.
        ("train(KeyError('x'))", ["KeyError('x')", "finished"]),
        ("train()\nsys.exit(3)", ["ExitCodeError('exit code 3')"]),
        # The parent has not trained, and ends normally.
        ("in_child()", ["finished", "finished"]),
        ("in_child(KeyError('x'))", ["KeyError('x')", "finished"]),
        ("in_child(SystemExit(3))", ["ExitCodeError('exit code 3')", "finished"]),
        ("in_child(SystemExit(0))", ["finished", "finished"]),
        (WITHIN_HANDLING, ["finished", "finished"]),
    ],
)
def test_process_that_trains_is_notified_when_it_ends(script: str, notified: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", HOOKS + script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:-1] == notified, done.stderr


CODES = """
import atexit, sys, threading
from harness.autologging.exit_hooks import ExitCodes
codes = ExitCodes()
codes.install()
atexit.register(lambda: print(repr(codes.failure())))
"""
CAUGHT = "try:\n    sys.exit(3)\nexcept SystemExit:\n    pass\n"
THREAD = "thread = threading.Thread(target=lambda: sys.exit(3))\nthread.start()\nthread.join()"
HANDLED = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    sys.exit(1)"
FAILED = "ExitCodeError('exit code 3')"
# Nothing of Python's shows it before 3.12, as docs/reference/autolog.md says.
RAISED = FAILED if sys.version_info >= (3, 12) else "None"


@pytest.mark.parametrize(
    ("end", "code", "seen"),
    [
        ("", 0, "None"),
        ("sys.exit()", 0, "None"),
        ("sys.exit(3)", 3, FAILED),
        ("exit(3)", 3, FAILED),
        ("quit(3)", 3, FAILED),
        ("raise SystemExit(3)", 3, RAISED),
        ("raise SystemExit(0)", 0, "None"),
        ("sys.exit('no data')", 1, "ExitCodeError('no data')"),
        ("sys.exit(75)", 75, "Stopped('stopped by exit code 75')"),
        (CAUGHT, 0, "None"),
        (THREAD, 0, "None"),
        (HANDLED, 1, "ZeroDivisionError('division by zero')"),
        ("codes.remove()\ncodes.install()\nsys.exit(3)", 3, FAILED),
    ],
)
def test_failure_is_the_exit_codes_when_the_script_exits(end: str, code: int, seen: str) -> None:
    done = subprocess.run([sys.executable, "-c", CODES + end], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, seen)


class Failing:
    """A training that counts the errors of which it is notified."""

    def __init__(self) -> None:
        self.num_errors = 0

    def fail(self, error: BaseException) -> BaseException:
        self.num_errors += 1
        return error


def test_error_is_shown_once_when_a_hook_of_an_earlier_run_was_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code has wrapped the hook of the first run, so that it stays below that of the second."""
    shown: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(error))
    hook, first, second = ExceptHook(), Failing(), Failing()
    hook.install(first)
    below = sys.excepthook
    monkeypatch.setattr(sys, "excepthook", lambda *arguments: below(*arguments))
    hook.remove()
    hook.install(second)
    error = ValueError("bad batch")
    sys.excepthook(ValueError, error, None)
    assert (shown, first.num_errors, second.num_errors) == ([error], 0, 1)
    hook.remove()
    sys.excepthook(ValueError, error, None)
    assert (shown, first.num_errors, second.num_errors) == ([error, error], 0, 1)
