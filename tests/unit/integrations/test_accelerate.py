"""`accelerator.log` through the outbox."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness import TrackingConfig
from harness.errors import HarnessError
from harness.integrations.accelerate import HarnessTracker
from tests.mlflow_reader import all_runs, client, history, only_run


def train(begin: int, end: int, lr: float) -> None:
    """A script that has put its state back by itself, at step `begin`."""
    AcceleratorState._reset_state(True)
    tracker = HarnessTracker("tracked", run_name="it", tracking=TrackingConfig(tags={"team": "vision"}))
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("", config={"lr": lr, "model": {"width": 4}})
    for step in range(begin, end):
        accelerator.log({"loss": torch.tensor(1.0 / (step + 1)), "note": "no number"}, step=step)
    accelerator.log({"loss/last": 0.5})
    accelerator.end_training()
    assert tracker.tracker is None and tracker.run_path == Path("runs/it")


def test_run_has_each_point_once_when_script_goes_on_before_its_end(tmp_path: Path) -> None:
    train(0, 8, lr=0.1)
    train(5, 12, lr=0.2)
    reader, found = client(tmp_path), only_run(tmp_path)
    assert found.info.status == "FINISHED"
    assert reader.get_experiment(found.info.experiment_id).name == "tracked"
    assert found.data.params == {"lr": "0.1", "model.width": "4"}
    assert found.data.tags["team"] == "vision"
    assert found.data.tags["harness.attempt.2.step_from"] == "5"
    assert found.data.tags["harness.attempt.2.param_drift"] == '{"lr": ["0.1", "0.2"]}'
    points = history(reader, found, "loss")
    assert [point.step for point in points] == list(range(12))
    assert [point.value for point in points] == pytest.approx([1.0 / (step + 1) for step in range(12)])
    assert [point.step for point in history(reader, found, "loss/last")] == [8, 12]


def test_each_training_has_a_run_when_one_tracker_sees_several_and_an_error_left_the_first(tmp_path: Path) -> None:
    tracker = HarnessTracker("tracked")
    hook = sys.excepthook
    for _ in range(2):
        accelerator = Accelerator(cpu=True, log_with=tracker)
        accelerator.init_trackers("")
        accelerator.log({"loss": 1.0})
    accelerator.end_training()
    assert sys.excepthook == hook
    reader = client(tmp_path)
    ends = {run.data.tags["harness.end_reason"]: run for run in all_runs(reader)}
    failed = ends.pop("training was left without a word, and another one has begun")
    (finished,) = ends.values()
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert [point.step for point in history(reader, finished, "loss")] == [0]

    # Accelerate has kept it from the first time, and would log everything twice.
    with pytest.raises(HarnessError, match="has the tracker twice now; make an Accelerator and a HarnessTracker for"):
        accelerator.init_trackers("")
    accelerator.end_training()
