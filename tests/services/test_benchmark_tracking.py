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


def test_figures_are_there_when_the_trainers_side_is_measured(tmp_path: Path) -> None:
    record = benchmark(tmp_path, "--only", "log,append", "--windows", "3")
    assert len(record["goals"]) == 6
    assert all(goal["met"] == (goal["seen"] <= goal["at_most"]) for goal in record["goals"])
    # Of what is measured here this alone is no matter of the machine's pace.
    (operators,) = [goal for goal in record["goals"] if goal["unit"] == "operators"]
    assert operators["met"]


def test_figures_are_there_when_delivery_and_uploads_are_measured(tmp_path: Path) -> None:
    words = ("--num_points", "2000", "--size_mb", "40", "--rounds", "1", "--step_ms", "1", "--stores", "s3,s3_proxied")
    record = benchmark(tmp_path, "--only", "delivery,upload,step", *words)
    assert [goal["name"].partition(",")[0].partition(" ")[0] for goal in record["goals"]] == [
        "delivery",
        "delivery",
        "upload",
        "upload",
        "step's",
    ]
    assert all(goal["seen"] > 0 for goal in record["goals"])
    assert set(record["upload"]["stores"]) == {"s3", "s3_proxied"}
    assert record["step"]["a core to spare"]["steps_per_window"] >= 5
