"""With which exit code a script has ended, as it is known when the interpreter ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

BEFORE = """
import atexit, sys, threading
from harness.autologging.exit_codes import ExitCodes
codes = ExitCodes()
codes.watch()
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
        ("codes.leave()\ncodes.watch()\nsys.exit(3)", 3, FAILED),
    ],
)
def test_failure_is_what_the_exit_says_when_the_script_ends_by(end: str, code: int, seen: str) -> None:
    done = subprocess.run([sys.executable, "-c", BEFORE + end], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, seen)
