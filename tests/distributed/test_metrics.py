"""What N ranks report is what one process over all the data reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launching import ROOT, accelerate, run

SCRIPT = ROOT / "tests" / "distributed" / "uneven_metrics.py"


def reported(cwd: Path, num_processes: int) -> list[dict[str, float]]:
    cwd.mkdir()
    strategy = "single" if num_processes == 1 else "ddp"
    done = run(accelerate(strategy, "--num_processes", str(num_processes), SCRIPT, cwd), cwd)
    assert done.code == 0, done.output
    return [json.loads((cwd / f"rank{rank}.json").read_text()) for rank in range(num_processes)]


def test_metrics_equal_one_process_when_shards_are_uneven(tmp_path: Path) -> None:
    (alone,) = reported(tmp_path / "one", 1)
    assert alone["train/ragged"] == pytest.approx(sum(v * v / 7 for v in range(1, 13)) / sum(range(1, 13)), rel=1e-6)
    for num_processes in (3, 4):
        by_rank = reported(tmp_path / str(num_processes), num_processes)
        assert all(values == by_rank[0] for values in by_rank), "the ranks do not agree"
        assert by_rank[0].keys() == alone.keys()
        for name, value in alone.items():
            assert by_rank[0][name] == pytest.approx(value, abs=1e-6), (name, num_processes)
