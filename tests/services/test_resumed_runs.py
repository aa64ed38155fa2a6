"""Killed and resumed runs: one MLflow run with each point and checkpoint once, and a record of each attempt."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from harness.tracking.publisher.sync import deliver_rest
from tests.launching import ROOT, descendants, harness, run, started
from tests.mlflow_reader import history, models
from tests.services.mlflow_server import MlflowServer

pytestmark = pytest.mark.services
DIGITS = ROOT / "configs" / "digits.yaml"
# 90 steps in each of 3 epochs, and a point at each fifth: killed in the second epoch.
KILLED_AT = 150
SAMPLED = ("--tracking.log_system_metrics",)
SAMPLE = "system/cpu_utilization_percentage"
SAMPLING = {"MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "2"}


def words_of(cwd: Path, server: MlflowServer, experiment: str, *more: str) -> Sequence[str | Path]:
    task = ("--task.class_path", "tests.services.tasks.Waits", "--task.init_args.directory", cwd)
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.experiment_name", experiment)
    words = ("train", "--config", DIGITS, *task, "--trainer.max_epochs", "3", "--run_name", "it", *tracking)
    return harness(*words, "--tracking.log_every_n_steps", "5", "--checkpoint.every_n_epochs", "1", *SAMPLED, *more)


def kill_at_step(words: Sequence[str | Path], cwd: Path, is_ready: Callable[[], bool], *, with_publisher: bool) -> None:
    """Start a run, and send SIGKILL while it waits at a step, once MLflow has the first epoch and `is_ready`."""
    with started([*words, "--task.init_args.at", str(KILLED_AT)], cwd, SAMPLING) as process:
        deadline_s = time.monotonic() + 90
        delivered = cwd / "runs/it/outbox/delivered.json"
        while not (
            (cwd / "arrived").exists() and delivered.exists() and "epoch-0001" in delivered.read_text() and is_ready()
        ):
            assert process.poll() is None and time.monotonic() < deadline_s, (cwd / "output.txt").read_text()
            time.sleep(0.05)
        for member in descendants(process.pid) if with_publisher else [process.pid]:
            os.kill(member, signal.SIGKILL)
        process.wait(10)
        # Wait here: `started` ends the process group on exit, but the publisher has its own session.
        if not with_publisher:
            _wait_for_text(cwd / "runs/it/attempts.json", '"ended"')
    (cwd / "go").touch()


def _wait_for_text(path: Path, text: str) -> None:
    deadline_s = time.monotonic() + 40
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline_s, path.read_text() if path.exists() else f"no {path}"
        time.sleep(0.05)


def the_run(server: MlflowServer, experiment: str) -> tuple[MlflowClient, Run]:
    reader = MlflowClient(server.uri)
    (only,) = reader.search_runs([reader.get_experiment_by_name(experiment).experiment_id])
    return reader, only


@pytest.mark.parametrize("with_publisher", [False, True], ids=["trainer-killed", "publisher-killed-too"])
def test_one_run_has_each_point_once_when_killed_and_started_again(
    tmp_path: Path, server: MlflowServer, with_publisher: bool
) -> None:
    experiment = f"again-{with_publisher}"

    def has_sampled() -> bool:
        return SAMPLE in the_run(server, experiment)[1].data.metrics

    kill_at_step(words_of(tmp_path, server, experiment), tmp_path, has_sampled, with_publisher=with_publisher)
    reader, killed = the_run(server, experiment)
    assert killed.info.status == ("RUNNING" if with_publisher else "FAILED")

    again = words_of(tmp_path, server, experiment, "--optimizer.init_args.weight_decay", "0.02")
    again_s = time.time()
    done = run(again, tmp_path, extra=SAMPLING)
    assert done.code == 0, done.output
    assert "it, attempt 2" in done.output
    assert "parameters have changed since the run began: optimizer.init_args" in done.output

    reader, finished = the_run(server, experiment)
    assert finished.info.run_id == killed.info.run_id
    assert finished.info.status == "FINISHED"
    steps = {key: [point.step for point in history(reader, finished, key)] for key in finished.data.metrics}
    for key, found in steps.items():
        # The end closes a window of no batches at the last step, in any run: its rates are two points there.
        assert {step for step, count in Counter(found).items() if count > 1} <= {max(found)}, (key, found)
    assert set(steps["train/loss"]) >= set(range(5, 265, 5))
    assert len(steps["epoch"]) == 3
    # System metrics of both attempts, whose step is the time in seconds.
    seconds = steps[SAMPLE]
    assert seconds[0] < again_s < seconds[-1] <= time.time()
    assert [model.name for model in models(reader, finished)] == ["epoch-0001", "epoch-0002", "epoch-0003"]

    tags = finished.data.tags
    first, second = (
        {
            name: tags.get(f"harness.attempt.{number}.{name}")
            for name in ("status", "step_from", "step_to", "world_size")
        }
        for number in (1, 2)
    )
    assert (first["status"], second["status"]) == ("FAILED", "FINISHED")
    assert "without saying how" in tags["harness.attempt.1.reason"]
    assert second["step_from"] == str(len(steps["train/loss"]) and models(reader, finished)[0].params["step"])
    assert second["world_size"] == "1"
    assert tags["harness.attempt.1.started"] < tags["harness.attempt.1.ended"] <= tags["harness.attempt.2.ended"]
    assert "optimizer.init_args" in tags["harness.attempt.2.param_drift"]
    assert not json.loads((tmp_path / "runs/it/outbox/delivered.json").read_text())["refused"]
    local = reader.download_artifacts(finished.info.run_id, "attempts.json", str(tmp_path))
    assert json.loads(Path(local).read_text()) == json.loads((tmp_path / "runs/it/attempts.json").read_text())
    assert (
        deliver_rest(tmp_path / "runs/it", None)
        == f"all of {tmp_path / 'runs/it'} is in MLflow run {finished.info.run_id}"
    )
