"""What the end shows on a real terminal, and what it does not show elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = """
from harness.io.progress import Progress
from harness.tracking.publisher.progress import Remaining
progress = Progress(enabled=True)
for left in (Remaining(2, 3_000_000, 0.0), Remaining(1, 1_500_000, 0.5)):
    progress.delivering(left.share, str(left))
progress.stop()
"""


def test_bar_shows_what_mlflow_has_not_had_on_a_terminal() -> None:
    terminal, its_end = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", CODE], stderr=its_end, check=True, timeout=60, env={**os.environ, "TERM": "xterm"}
    )
    os.close(its_end)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert "delivering to MLflow" in shown
    assert "0% (3.0 MB left, 2 checkpoints to go)" in shown
    assert "50% (1.5 MB left, 1 checkpoint to go)" in shown


def test_nothing_is_drawn_without_a_terminal() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, timeout=60)
    assert done.stderr == done.stdout == b""
