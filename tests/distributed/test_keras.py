"""`keras.Model.fit` with our callback, on real images. In processes of its own: a process has one backend."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import tests.launching
from harness.checkpoint.format.commit import list_checkpoints
from tests.launching import ROOT
from tests.mlflow_reader import all_runs, client, history, models, only_run

SCRIPTS = ROOT / "tests" / "local" / "integrations"


def run(cwd: Path, *words: str, script: str = "keras_fit.py") -> tests.launching.Done:
    return tests.launching.run([sys.executable, SCRIPTS / script, *words], cwd, extra={"KERAS_BACKEND": "torch"})


def test_models_load_and_give_the_same_when_fit_is_stopped_and_goes_on(tmp_path: Path) -> None:
    stopped = run(tmp_path, "stop")
    assert stopped.code == 75, stopped.output
    assert only_run(tmp_path).info.status == "KILLED"
    names = [name for name, _ in list_checkpoints(tmp_path / "runs/digits/checkpoints")]
    assert names[:2] == ["epoch-0001", "epoch-0002"] and names[2].startswith("step-0000002")

    done = run(tmp_path, "check")
    assert done.code == 0, done.output
    assert "the same" in done.output
    reader = client(tmp_path)
    mlflow_run, tested = sorted(all_runs(reader), key=lambda run: str(run.info.run_name))
    assert mlflow_run.info.status == "FINISHED"
    # Behind the end of `fit`, as part of the second attempt.
    assert tested.info.status == "FINISHED"
    assert [point.step for point in history(reader, tested, "test/loss")] == [32]
    assert "harness.attempt.3.started" not in tested.data.tags
    assert mlflow_run.data.tags["harness.attempt.2.step_from"] == "16"
    for key in ("train/loss", "eval/loss", "epoch"):
        assert [point.step for point in history(reader, mlflow_run, key)] == [8, 16, 24, 32], key
    assert [model.tags["step"] for model in models(reader, mlflow_run)][-2:] == ["24", "32"]


def test_run_has_failed_with_its_reason_when_fit_raises(tmp_path: Path) -> None:
    failed = run(tmp_path, "fail")
    assert failed.code == 1 and "RuntimeError: fell out" in failed.output
    mlflow_run = only_run(tmp_path)
    assert mlflow_run.info.status == "FAILED"
    assert mlflow_run.data.tags["harness.end_reason"] == "RuntimeError: fell out"


def test_steps_and_state_are_the_optimizers_when_gradients_are_accumulated_and_fit_goes_on(tmp_path: Path) -> None:
    failed = run(tmp_path, "fail", script="keras_accumulating.py")
    assert failed.code == 1 and "RuntimeError: fell out" in failed.output, failed.output

    done = run(tmp_path, "check", script="keras_accumulating.py")
    assert done.code == 0, done.output
    found = [(name, manifest.step) for name, manifest in list_checkpoints(tmp_path / "runs/digits/checkpoints")]
    assert found == [("epoch-0001", 2), ("epoch-0002", 5), ("epoch-0003", 8), ("epoch-0004", 10)]
    mlflow_run = only_run(tmp_path)
    assert mlflow_run.data.tags["harness.attempt.2.step_from"] == "5"
    rates = history(client(tmp_path), mlflow_run, "train/lr")
    assert [point.step for point in rates] == [2, 5, 8, 10]
    assert f"the same, at the rate {rates[-1].value}" in done.output


def test_each_fit_has_a_run_that_ended_as_it_did_when_one_callback_sees_several(tmp_path: Path) -> None:
    done = run(tmp_path, script="keras_ends.py")
    assert done.code == 0, done.output
    assert "as they ended" in done.output
    ends = {run.data.tags.get("harness.end_reason"): run.info.status for run in all_runs(client(tmp_path))}
    assert ends["training was abandoned: another one began in the same process"] == "FAILED"
    assert sorted(ends.values()) == ["FAILED", "FINISHED"]


@pytest.mark.parametrize("backend", ["tensorflow", "numpy"])
def test_remedy_is_told_when_the_backend_is_another(tmp_path: Path, backend: str) -> None:
    done = tests.launching.run(
        [sys.executable, "-c", "import harness.integrations.keras"], tmp_path, extra={"KERAS_BACKEND": backend}
    )
    assert done.code == 1
    assert "set KERAS_BACKEND=torch in the environment, before keras is imported" in done.output.splitlines()[-1]
