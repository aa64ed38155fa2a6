from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from harness.checkpoint.format.commit import Manifest
from harness.config.schema import ClassSpec, TrackingConfig
from harness.distributed.collectives import Collectives
from harness.distributed.topology import Topology
from harness.errors import PeerFailure, RunDirError, Stopped
from harness.io.progress import Progress
from harness.tasks import Digits
from harness.tracking.journal.entries import Entry, read_entries
from harness.training.run_session import RunSession
from tests.services.mlflow_server import make_database

CPU = torch.device("cpu")
ALONE = Topology("single", 0, 1, 1, "cpu", "CPU", "fp32")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[RunSession, Path]]:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", {"lr": 0.1}).path
    yield run, path
    run.finish()


def entries(path: Path, kind: str) -> list[Entry]:
    return [entry for entry in read_entries(path / "outbox") if entry.kind == kind]


def test_points_are_those_of_the_checkpoint_when_training_went_on_before_the_commit(
    opened: tuple[RunSession, Path],
) -> None:
    run, path = opened
    run.recorder.log_metrics({"train/loss": 0.5, "epoch": 1.0}, 10)
    run.recorder.keep_points("epoch-0001", {"train/loss": 0.5})
    run.recorder.log_metrics({"train/loss": 0.4}, 20)
    run.recorder.publish("epoch-0001", Manifest("k", 1, 10, 0, {"train/loss": 0.5}, (), {}, {}))
    (logged, _) = entries(path, "metrics")
    (published,) = entries(path, "checkpoint")
    # The same value, time and step as the point that was logged: MLflow stores it once.
    assert published.body["metrics"] == [["train/loss", 0.5, logged.time_ms, 10]]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("bad sample"), "FAILED", "ValueError: bad sample"),
        (Stopped("SIGTERM"), "KILLED", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt"),
        (PeerFailure(1, "out of memory"), "FAILED", "rank 1 failed: out of memory"),
        (PeerFailure(1, "stopped by SIGINT", "SIGINT"), "KILLED", "rank 1 was stopped by SIGINT"),
    ],
)
def test_end_is_recorded_as_it_was_when_run_fails_by(
    tmp_path: Path, error: BaseException, status: str, reason: str
) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", None).path
    cause = run.report_failure(error)
    assert cause is error
    run.end_failed(cause)
    (end,) = entries(path, "end")
    assert dict(end.body) == {"status": status, "reason": reason, "step": 0}


# ------------------------------------------------------------------------- the next attempt


def again(runs_dir: Path, params: dict[str, object] | None = None) -> tuple[RunSession, Path]:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    directory = run.open(Collectives(0, 1), CPU, runs_dir, "it", params)
    assert directory.continues
    return run, directory.path


def facts(path: Path, number: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in entries(path, "attempt"):
        if entry.body["number"] == number:
            found |= entry.body["facts"]
    return found


def logged(path: Path) -> list[tuple[str, int, float]]:
    return [
        (key, entry.body["step"], value)
        for entry in entries(path, "metrics")
        for key, value in entry.body["values"].items()
    ]


def test_points_are_there_once_when_steps_are_repeated(tmp_path: Path) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", None).path
    for step in (10, 20, 30):
        run.recorder.log_metrics({"loss": 1.0 / step, "perf/steps_per_s": 5.0}, step)
    run.end_failed(run.report_failure(KeyboardInterrupt()))

    run, _ = again(tmp_path)
    run.recorder.set_start(20, "step-00000020")
    for step in (20, 30, 40):
        run.recorder.log_metrics({"loss": 1.0 / step + 0.1 * (step == 30), "perf/steps_per_s": 6.0, "epoch": 1.0}, step)
    run.finish()
    assert [point for point in logged(path) if point[0] == "loss"] == [("loss", s, 1.0 / s) for s in (10, 20, 30, 40)]
    assert [point[1] for point in logged(path) if point[0] == "epoch"] == [20, 30, 40]
    assert [point[1:] for point in logged(path) if point[0].startswith("perf/")] == [
        (10, 5.0), (20, 5.0), (30, 5.0), (40, 6.0),
    ]  # fmt: skip
    second = facts(path, 2)
    assert (second["step_from"], second["resumed_from"]) == ("20", "step-00000020")
    assert (second["points_repeated"], second["points_differing"]) == ("4", "1")
    assert second["largest_relative_difference"] == "0.75"
    assert [entry.body["step"] for entry in entries(path, "end")] == [30, 40]


def test_points_are_there_once_when_nothing_was_restored(tmp_path: Path) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", None).path
    run.recorder.log_metrics({"loss": 0.5}, 10)
    run.end_failed(run.report_failure(KeyboardInterrupt()))
    run, _ = again(tmp_path)
    run.recorder.log_metrics({"loss": 0.5}, 10)
    run.finish()
    assert logged(path) == [("loss", 10, 0.5)]
    assert facts(path, 2)["step_from"] == "0"


def test_checkpoint_has_the_first_attempts_points_when_its_metrics_were_repeated(tmp_path: Path) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", None).path
    run.recorder.log_metrics({"eval/loss": 0.7}, 5)
    run.recorder.log_metrics({"loss": 0.5}, 20)
    run.end_failed(run.report_failure(KeyboardInterrupt()))
    first, second = entries(path, "metrics")
    run, _ = again(tmp_path)
    run.recorder.set_start(10, "step-00000010")
    run.recorder.log_metrics({"loss": 0.4}, 20)
    run.recorder.keep_points("step-00000020", {"loss": 0.4, "eval/loss": 0.7})
    run.recorder.publish("step-00000020", Manifest("k", 1, 20, 0, {}, (), {}, {}))
    run.finish()
    (published,) = entries(path, "checkpoint")
    # As MLflow has them: other values or times would be second points in the run's history.
    assert published.body["metrics"] == [["loss", 0.5, second.time_ms, 20], ["eval/loss", 0.7, first.time_ms, 5]]


def test_parameters_are_sent_once_and_changes_told_when_they_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", {"lr": 0.1, "trainer": {"max_epochs": 3}}).path
    run.end_failed(run.report_failure(KeyboardInterrupt()))
    run, _ = again(tmp_path, {"lr": 0.2, "trainer": {"max_epochs": 3, "max_steps": 9}})
    run.finish()
    sent = [dict(entry.body) for entry in entries(path, "params")]
    assert sent == [{"lr": "0.1", "trainer.max_epochs": "3"}, {"trainer.max_steps": "9"}]
    assert json.loads(facts(path, 2)["param_drift"]) == {"lr": ["0.1", "0.2"]}
    assert "parameters have changed since the run began: lr 0.1 -> 0.2" in capsys.readouterr().err


def test_checkpoint_is_published_once_when_an_attempt_was_killed_around_its_commit(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path / "runs", "it", None).path
    run.recorder.log_metrics({"eval/loss": 0.5}, 10)
    run.end_failed(run.report_failure(KeyboardInterrupt()))
    # Its directory is committed, its entry was never written.
    shutil.copytree(make_checkpoint({"w": torch.ones(3)}), path / "checkpoints" / "epoch-0001")
    for _ in range(2):
        run, _ = again(tmp_path / "runs")
        run.finish()
    (published,) = entries(path, "checkpoint")
    (point,) = entries(path, "metrics")
    assert (published.body["name"], published.body["key"], published.body["step"]) == ("epoch-0001", "key", 10)
    assert published.body["metrics"] == [["eval/loss", 0.5, point.time_ms, 10]]
    assert published.body["files"] == ["model.safetensors", "manifest.json"]


def recipes_of(path: Path) -> list[int | None]:
    """The width in the recipe of each checkpoint that was published."""
    names = [entry.body["recipe"] for entry in entries(path, "checkpoint")]
    return [name and json.loads((path / "outbox" / name).read_text())["init_args"].get("width") for name in names]


def test_checkpoint_has_the_recipe_of_its_own_attempt_when_a_later_one_has_another(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path / "runs", "it", None).path
    task = Digits(width=4)
    run.recorder.describe_recipe(
        ClassSpec("harness.tasks.Digits", {"width": 4}), task.model(), task.input_example, None
    )
    run.end_failed(run.report_failure(KeyboardInterrupt()))
    shutil.copytree(make_checkpoint({"w": torch.ones(3)}), path / "checkpoints" / "epoch-0001")
    for attempt, width in ((2, 8), (3, 8)):
        run, _ = again(tmp_path / "runs")
        run.recorder.describe_recipe(
            ClassSpec("harness.tasks.Digits", {"width": width}), Digits(width).model(), None, None
        )
        run.recorder.publish(f"epoch-000{attempt}", Manifest(f"k{attempt}", attempt, 10, 0, {}, (), {}, {}))
        run.finish()
    assert recipes_of(path) == [4, 8, 8]
    # What nobody is to have in MLflow is not run for it; and the same recipe is there once.
    assert sorted(each.name for each in (path / "outbox").glob("recipe-*")) == ["recipe-1.json", "recipe-2.json"]
    assert "signature" not in json.loads((path / "outbox" / "recipe-1.json").read_text())


def test_training_goes_on_without_a_signature_when_the_example_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking = TrackingConfig(tracking_uri=make_database(tmp_path / "mlflow.db"), start_timeout_s=60)
    run = RunSession(ALONE, tracking, Progress(enabled=True, bar=False))
    path = run.open(Collectives(0, 1), CPU, tmp_path, "it", None).path
    run.recorder.describe_recipe(ClassSpec("torch.nn.Linear"), torch.nn.Linear(3, 2), torch.ones(2, 4), None)
    run.finish()
    assert "the models in MLflow have no signature: input_example: RuntimeError: mat1" in capsys.readouterr().err
    assert "signature" not in json.loads((path / "outbox" / "recipe-1.json").read_text())


def test_run_can_go_on_in_the_same_process_when_it_has_ended(tmp_path: Path) -> None:
    run = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    run.open(Collectives(0, 1), CPU, tmp_path, "it", None)
    other = RunSession(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    with pytest.raises(RunDirError, match="in use by another PeriodicLogger of this process"):
        other.open(Collectives(0, 1), CPU, tmp_path, "it", None)
    other.end_failed(other.report_failure(KeyboardInterrupt()))
    run.finish()
    run, _ = again(tmp_path)
    run.finish()
