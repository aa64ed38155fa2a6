"""A run with a real MLflow server: what it shows, and how it survives an outage."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from harness.tracking.journal.entries import read_entries
from tests.launching import ROOT, environment, harness, run, started
from tests.mlflow_reader import history, models
from tests.services.mlflow_server import MlflowServer

pytestmark = pytest.mark.services
DIGITS = ROOT / "configs" / "digits.yaml"


def the_run(server: MlflowServer, experiment: str) -> tuple[MlflowClient, Run]:
    reader = MlflowClient(server.uri)
    found = reader.get_experiment_by_name(experiment)
    (only,) = reader.search_runs([found.experiment_id])
    return reader, only


def sent_points(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric point in the outbox: name -> (step, value), by step."""
    points: dict[str, list[tuple[int, float]]] = {}
    for entry in read_entries(run_dir / "outbox"):
        if entry.kind == "metrics":
            for key, value in entry.body["values"].items():
                points.setdefault(key, []).append((entry.body["step"], value))
    return {key: sorted(values) for key, values in points.items()}


def make_dirty_work_tree(directory: Path) -> str:
    """A git repository with one commit and a change since; returns the commit."""
    git = ["git", "-C", str(directory), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    (directory / "train.py").write_text("one = 1\n")
    for words in (["init", "-q"], ["add", "train.py"], ["commit", "-qm", "Begin"]):
        subprocess.run([*git, *words], check=True)
    (directory / "train.py").write_text("one = 2\n")
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_mlflow_shows_what_the_disk_has_when_two_processes_train(tmp_path: Path, server: MlflowServer) -> None:
    commit = make_dirty_work_tree(tmp_path)
    words = ("launch", "--num_processes", "2", "--config", DIGITS, "--trainer.max_epochs", "4", "--run_name", "it")
    tracking = ("--tracking.experiment_name", "two", "--tracking.registered_model_name", "digits")
    done = run(
        harness(*words, *tracking, "--checkpoint.every_n_epochs", "2", "--tracking.log_system_metrics", "true"),
        tmp_path,
        extra={"MLFLOW_TRACKING_URI": server.uri},
    )
    assert done.code == 0, done.output
    listed = subprocess.run(
        harness("checkpoints", tmp_path / "runs/it", "--json"), capture_output=True, check=True, env=environment()
    )
    on_disk = json.loads(listed.stdout)
    assert [record["epoch"] for record in on_disk] == [2, 4]

    reader, mlflow_run = the_run(server, "two")
    assert mlflow_run.info.status == "FINISHED"
    in_mlflow = [
        {
            "name": model.name,
            "epoch": int(model.params["epoch"]),
            "step": int(model.params["step"]),
            "metrics": {metric.key: metric.value for metric in model.metrics or []},
            "mlflow_model_id": model.model_id,
        }
        for model in models(reader, mlflow_run)
    ]
    assert in_mlflow == [{key: record[key] for key in in_mlflow[0]} for record in on_disk]

    run_record = json.loads((tmp_path / "runs/it/run.json").read_text())
    assert run_record["run_id"] == mlflow_run.info.run_id
    assert mlflow_run.data.params["trainer.max_epochs"] == "4"
    assert mlflow_run.data.tags["harness.strategy"] == "ddp"
    assert mlflow_run.data.tags["mlflow.source.git.commit"] == commit
    assert mlflow_run.data.tags["harness.git_dirty"] == "true"
    assert {i.tags[0].value: i.dataset.name for i in mlflow_run.inputs.dataset_inputs} == dict.fromkeys(
        ("train", "eval"), "TensorDataset"
    )
    assert {"system/cpu_utilization_percentage", "system/disk_available_megabytes"} <= mlflow_run.data.metrics.keys()
    assert [file.path for file in reader.list_artifacts(mlflow_run.info.run_id)] == [
        "attempts.json",
        "model_summary.txt",
    ]
    versions = reader.search_model_versions("name = 'digits'")
    assert [version.source for version in reversed(versions)] == [f"models:/{r['mlflow_model_id']}" for r in on_disk]
    mlflow.set_tracking_uri(server.uri)
    for record in on_disk:
        fetched = tmp_path / "fetched" / record["name"]
        fetched.mkdir(parents=True)
        mlflow.artifacts.download_artifacts(f"models:/{record['mlflow_model_id']}", dst_path=str(fetched))
        assert {path.suffix for path in fetched.iterdir()} == {"", ".json", ".safetensors", ".txt", ".yaml"}
        for name in ("manifest.json", "model.safetensors"):
            assert (fetched / name).read_bytes() == (
                tmp_path / "runs/it/checkpoints" / record["name"] / name
            ).read_bytes()


@pytest.fixture
def outage_words(tmp_path: Path, server: MlflowServer) -> list[str | Path]:
    task = ("--task.class_path", "tests.services.tasks.Waits", "--task.init_args.directory", tmp_path)
    words = ("train", "--config", DIGITS, *task, "--trainer.max_epochs", "3", "--run_name", "it")
    tracking = ("--tracking.tracking_uri", server.uri, "--tracking.log_every_n_steps", "5")
    return harness(*words, *tracking, "--checkpoint.every_n_epochs", "1", "--checkpoint.when_busy", "wait")


def wait_for(path: Path, text: str = "", limit_s: float = 60) -> None:
    """Wait until a file is there and holds a text."""
    deadline_s = time.monotonic() + limit_s
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline_s, f"no {text!r} in {path} after {limit_s} s"
        time.sleep(0.05)


def assert_all_delivered_once(server: MlflowServer, experiment: str, run_dir: Path) -> None:
    reader, mlflow_run = the_run(server, experiment)
    assert mlflow_run.info.status == "FINISHED"
    for key, points in sent_points(run_dir).items():
        assert [(point.step, point.value) for point in history(reader, mlflow_run, key)] == points, key
    assert [model.name for model in models(reader, mlflow_run)] == ["epoch-0001", "epoch-0002", "epoch-0003"]


def test_nothing_is_lost_or_twice_when_server_is_killed_and_restarted(
    tmp_path: Path, server: MlflowServer, outage_words: list[str | Path]
) -> None:
    with started([*outage_words, "--tracking.experiment_name", "outage"], tmp_path) as process:
        wait_for(tmp_path / "arrived")
        server.stop()
        (tmp_path / "go").touch()
        # Training does not wait for an unreachable server.
        wait_for(tmp_path / "output.txt", "epoch   3")
        server.start()
        assert process.wait(90) == 0, (tmp_path / "output.txt").read_text()
    assert_all_delivered_once(server, "outage", tmp_path / "runs/it")


def test_sync_delivers_the_rest_when_server_was_away_at_the_end(
    tmp_path: Path, server: MlflowServer, outage_words: list[str | Path]
) -> None:
    words = [*outage_words, "--tracking.experiment_name", "late", "--tracking.drain_timeout_s", "1"]
    with started(words, tmp_path) as process:
        wait_for(tmp_path / "arrived")
        server.stop()
        (tmp_path / "go").touch()
        assert process.wait(90) == 0
        # The publisher lingers a while for the server, then lets go of the run.
        output = (tmp_path / "output.txt").read_text()
        assert "deliver it with `harness sync runs/it`" in output
    server.start()
    done = run(harness("sync", tmp_path / "runs/it"), tmp_path, timeout_s=90)
    assert done.code == 0, done.output
    assert_all_delivered_once(server, "late", tmp_path / "runs/it")
    assert "delivers this run already" not in done.output
