"""`accelerator.log` through the outbox."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from harness import TrackingConfig
from harness.errors import HarnessError
from harness.integrations.accelerate import HarnessTracker
from harness.tracking.mlflow.names import clean_key
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
    failed = ends.pop("training was abandoned: another one began in the same process")
    (finished,) = ends.values()
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert [point.step for point in history(reader, finished, "loss")] == [0]

    # Accelerate has kept it from the first time, and would log everything twice.
    with pytest.raises(HarnessError, match="has the tracker twice; make an Accelerator and a HarnessTracker for"):
        accelerator.init_trackers("")
    accelerator.end_training()


def test_all_that_can_be_arrives_when_names_values_and_steps_are_odd(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = {f"p{number}": number for number in range(40)}
    tags = {"team@a": "x", "": "y", "broken": "\udcff\0"}
    tracker = HarnessTracker("tracked", tracking=TrackingConfig(tags=tags))
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("", config={**config, "acc@1": 1, "acc%1": 2, "": 3, "y" * 300: 4, "cut": "z" * 7000})
    for step in range(3):
        odd = {"bad|name": 1.0, "\N{PARTY POPPER}": 2.0, "x" * 300: 3.0, "a/../b": 4.0, "": 5.0, "..a": 6.0}
        values = {"big": 2**63 + 1, "huge": 10**400, "nothing": None, "imaginary": 1j, "infinite": float("inf")}
        accelerator.log({**odd, **values, "good": 1.0}, step=step)
    for step in (3.0, np.float32(4.5), torch.tensor(5), "6", 2**63, -1, True):
        accelerator.log({"steps": 1.0}, step=step)
    assert tracker.tracker is not None
    tracker.tracker.log_text("../../outside.txt", "text")
    accelerator.end_training()

    reader, run = client(tmp_path), only_run(tmp_path)
    assert run.info.status == "FINISHED"
    odd_keys = {clean_key(name) for name in ("bad|name", "\N{PARTY POPPER}", "a/../b", "", "..a")}
    keys = {*odd_keys, "big", "infinite", "good", "steps"}
    assert {key for key in run.data.metrics if not key.startswith("x")} == keys
    assert all(len(history(reader, run, key)) == 3 for key in run.data.metrics if key != "steps")
    assert [point.step for point in history(reader, run, "steps")] == [-1, 1, 3, 4, 5, 6, 7]
    assert (
        run.data.params.keys() >= config.keys() | {clean_key("acc@1"), clean_key("acc%1"), clean_key("")}
        and len(run.data.params) == 45
    )
    assert {run.data.tags[key] for key in (clean_key("team@a"), clean_key(""), "broken")} == {"x", "y", "??"}
    assert [file.path for file in reader.list_artifacts(run.info.run_id, "__/__")] == ["__/__/outside-5177fb1e.txt"]
    said = capfd.readouterr().err
    for line in (
        "metric 'bad|name' is named 'bad_name-ee1c6188' in MLflow",
        "parameter 'acc%1' is named 'acc_1-59cc9134' in MLflow",
        "tag 'team@a' is named 'team_a-",
        "nothing is left out: a NoneType is no number",
        "a step is 9223372036854775808, no integer of 64 bits",
    ):
        assert said.count(line) == 1, line
    assert "refused" not in said
