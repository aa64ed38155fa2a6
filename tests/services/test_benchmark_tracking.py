"""The benchmark of the tracking runs through, over little."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, run

pytestmark = pytest.mark.services


def benchmark(tmp_path: Path, *words: str) -> dict[str, Any]:
    script = ROOT / "benchmarks" / "tracking.py"
    done = run([sys.executable, script, "--json", *words], tmp_path, timeout_s=200)
    assert done.code == 0, done.output
    record: dict[str, Any] = json.loads(done.output[done.output.index("{\n") :])
    return record


def test_figures_are_there_when_tracking_is_measured(tmp_path: Path) -> None:
    """Run the fast parts. Uploads and steps need minutes and are measured by hand."""
    words = ("--only", "log,append,delivery", "--windows", "3", "--num_points", "2000", "--rounds", "1")
    record = benchmark(tmp_path, *words)
    at_most = [goal for goal in record["goals"] if "at_most" in goal]
    assert (len(at_most), len(record["goals"])) == (6, 9)
    assert all(goal["met"] == (goal["seen"] <= goal["at_most"]) for goal in at_most)
    # The only figure that does not depend on the machine's speed.
    (operators,) = [goal for goal in record["goals"] if goal["unit"] == "operators"]
    assert operators["met"]
