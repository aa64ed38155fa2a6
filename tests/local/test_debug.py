from __future__ import annotations

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.parsing import parse_run_config
from harness.errors import ConfigError, LaunchError
from launch.debug import DEBUG_OPTIONS, debug, describe

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
Pair = namedtuple("Pair", "a b")

BROKEN_TASK = """\
from harness.tasks import Digits

class Broken(Digits):
    def step(self, model, batch):
        raise RuntimeError("in the task")
"""


def harness_debug(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (directory / "temporary").mkdir()
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", "debug", "--config", DIGITS, *words],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=240,
        env={**os.environ, "TMPDIR": str(directory / "temporary"), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([[1, 5], [2, 3]]), "int64[2, 2] 1..5"),
        (torch.tensor(0.5), "float32[] 0.5..0.5"),
        (torch.zeros(0, 3), "float32[0, 3]"),
        (torch.tensor([True, False]), "bool[2] 0..1"),
        ({"x": torch.ones(2), "y": ["a"]}, "{x: float32[2] 1..1, y: [str]}"),
        ((torch.ones(1), 3), "[float32[1] 1..1, int]"),
        (Pair(torch.ones(1), None), "[float32[1] 1..1, NoneType]"),
        ("text", "str"),
    ],
)
def test_batch_is_described_when_nested(value: Any, expected: str) -> None:
    assert describe(value).replace("True", "1").replace("False", "0") == expected


def test_options_are_valid_when_parsed() -> None:
    config = parse_run_config(["--config", DIGITS, *DEBUG_OPTIONS])
    assert config.trainer.detect_anomaly
    assert not config.tracking.enabled
    assert config.checkpoint.every_n_epochs is None


def test_debug_is_refused_when_started_by_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="one process"):
        debug(["--config", DIGITS])


def test_no_directory_is_left_when_the_configuration_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError):
        debug(["--config", DIGITS, "--trainer.max_epochs", "0"])
    assert list(tmp_path.iterdir()) == []


def test_model_and_batch_are_printed_when_debug_succeeds(tmp_path: Path) -> None:
    done = harness_debug(tmp_path, "--trainer.limit_train_batches", "1", "--task.init_args.width", "2")
    assert done.returncode == 0, done.stderr
    assert "Conv2d" in done.stdout
    assert "first training batch: [float32[16, 1, 8, 8] 0..1, int64[16] " in done.stdout
    assert "step      1" in done.stderr  # the command line has precedence over debug's options
    assert [p.name for p in tmp_path.iterdir()] == ["temporary"]
    assert not list((tmp_path / "temporary").glob("harness-debug-*"))


def test_traceback_is_printed_when_the_task_fails(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(BROKEN_TASK)
    done = harness_debug(tmp_path, "--task.class_path", "my_task.Broken")
    assert done.returncode == 1
    assert 'raise RuntimeError("in the task")' in done.stderr
    assert done.stderr.splitlines()[-1] == "harness: error: RuntimeError: in the task"
