"""What is called back when a script ends, or a child that it has started."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEFORE = """
import multiprocessing, sys
from harness.autologging.exit_hooks import ExitHooks

def told(what):
    print(what, flush=True)
    return what

ending = ExitHooks(lambda: told("finished"), lambda error: told(repr(error)))
ending.watch()

def train(end=None):
    ending.begins()
    if isinstance(end, BaseException):
        raise end

def in_child(end=None):
    child = multiprocessing.get_context("fork").Process(target=train, args=(end,))
    child.start()
    child.join()

"""
WITHIN_HANDLING = "try:\n    1 / 0\nexcept ZeroDivisionError:\n    in_child()"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("train()", ["finished"]),
        # Each call is told; of those of one training the switch takes the first.
        ("train(KeyError('x'))", ["KeyError('x')", "finished"]),
        ("train()\nsys.exit(3)", ["ExitCodeError('exit code 3')"]),
        # The parent has not trained, and ends by itself.
        ("in_child()", ["finished", "finished"]),
        ("in_child(KeyError('x'))", ["KeyError('x')", "finished"]),
        ("in_child(SystemExit(3))", ["ExitCodeError('exit code 3')", "finished"]),
        ("in_child(SystemExit(0))", ["finished", "finished"]),
        (WITHIN_HANDLING, ["finished", "finished"]),
    ],
)
def test_end_is_told_in_the_process_that_trains_when_the_script_is(script: str, told: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE + script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n")[:-1] == told, done.stderr
