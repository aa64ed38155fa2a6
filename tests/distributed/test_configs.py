"""Every file in configs/ through the real command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from harness.diagnostics.report import checkpoint_records
from tests.launching import ROOT, harness, run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SMALL = {"byte_lm": ("--task.init_args.max_text_bytes", "100000", "--trainer.max_epochs", "1")}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_when_run_by_command_line(tmp_path: Path, config: Path) -> None:
    limits = ("--trainer.max_steps", "6", "--trainer.limit_eval_batches", "2", "--run_name", "it")
    done = run(harness("train", *limits, "--config", config, *SMALL.get(config.stem, ())), tmp_path)
    assert done.code == 0, done.output
    (record,) = checkpoint_records(tmp_path / "runs" / "it")
    assert record["step"] == 6
    assert record["mlflow_model_id"] is not None
    resolved = yaml.safe_load((tmp_path / "runs" / "it" / "config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 6


def test_resolved_config_gives_the_same_run_when_trained_again(tmp_path: Path) -> None:
    words = ("--trainer.max_steps", "6", "--tracking.enabled", "false")
    first = run(harness("train", "--config", ROOT / "configs/digits.yaml", "--run_name", "one", *words), tmp_path)
    again = ("--config", tmp_path / "runs/one/config.yaml", "--run_name", "two")
    second = run(harness("train", *again), tmp_path)
    assert (first.code, second.code) == (0, 0), second.output
    one, two = (checkpoint_records(tmp_path / "runs" / name)[-1]["metrics"] for name in ("one", "two"))
    assert one == two


def test_debug_shows_batch_and_model_and_leaves_nothing_when_run(tmp_path: Path) -> None:
    done = run(harness("debug", "--config", ROOT / "configs/digits.yaml"), tmp_path)
    assert done.code == 0, done.output
    assert "first training batch: [float32[16, 1, 8, 8] 0..1, int64[16] " in done.output
    assert "Conv2d" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.txt"]


def test_debug_stops_at_a_breakpoint_when_the_task_has_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from harness.tasks import Digits\n"
        "class Mine(Digits):\n"
        "    def step(self, model, batch):\n"
        "        breakpoint()\n"
        "        return super().step(model, batch)\n"
    )
    words = (
        "debug",
        "--config",
        ROOT / "configs/digits.yaml",
        "--task.class_path",
        "mine.Mine",
        "--task.init_args",
        "{}",
    )
    done = run(harness(*words), tmp_path)
    # Standard input is empty here, so the debugger reads its end there and quits.
    assert "(Pdb)" in done.output
    assert done.code == 1
