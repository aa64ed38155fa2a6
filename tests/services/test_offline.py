"""Offline training: `harness sync` creates the complete run afterwards. And nested runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from harness.config.schema import TrackingConfig
from harness.run.lock import RunLock
from harness.tracking.journal.entries import read_entries
from harness.tracking.publisher.sync import deliver_rest, is_incomplete
from harness.tracking.tracker import Tracker
from tests.launching import ROOT, harness, run, started
from tests.services.mlflow_server import MlflowServer
from tests.services.test_server import assert_all_delivered_once, wait_for

pytestmark = pytest.mark.services

CREATED_MS = 1_700_000_000_000
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def words(tmp_path: Path, uri: str, experiment: str, name: str) -> list[str | Path]:
    return [
        *("train", "--config", ROOT / "configs" / "digits.yaml", "--run_dir", tmp_path / "runs", "--run_name", name),
        *("--tracking.tracking_uri", uri, "--tracking.experiment_name", experiment, "--tracking.offline", "true"),
        *("--trainer.max_epochs", "3", "--checkpoint.every_n_epochs", "1", "--trainer.limit_train_batches", "12"),
        *("--checkpoint.when_busy", "wait"),  # epochs are short
    ]


def test_run_is_complete_when_synced_from_another_directory(tmp_path: Path, server: MlflowServer) -> None:
    server.stop()  # nobody is to be asked while it trains
    done = run(harness(*words(tmp_path, server.uri, "offline", "it")), cwd=tmp_path)
    assert done.code == 0, done.output
    assert "harness sync" in done.output
    run_dir = tmp_path / "runs" / "it"
    assert "run_id" not in json.loads((run_dir / "run.json").read_text())
    times = {entry.time_ms for entry in read_entries(run_dir / "outbox", kinds=("metrics",))}
    (end,) = read_entries(run_dir / "outbox", kinds=("end",))
    server.start()
    # Another host has it under another path, and nothing of this process's environment.
    moved = tmp_path / "elsewhere" / "it"
    shutil.copytree(run_dir, moved)
    done = run(harness("sync", "--all", tmp_path / "elsewhere"), cwd=tmp_path)
    assert done.code == 0, done.output
    assert_all_delivered_once(server, "offline", moved)
    client = MlflowClient(server.uri)
    found = client.get_run(json.loads((moved / "run.json").read_text())["run_id"])
    assert found.info.status == "FINISHED"
    assert found.info.start_time == json.loads((run_dir / "run.json").read_text())["created_ms"]
    assert found.info.end_time == end.time_ms
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert {point.timestamp for point in history} <= times
    assert len(client.search_logged_models([found.info.experiment_id])) == 3
    # Once more finds nothing to do.
    assert not is_incomplete(moved)
    assert run(harness("sync", "--all", tmp_path / "elsewhere"), cwd=tmp_path).code == 0


def offline_tracker(run_dir: Path, server: MlflowServer, **config: str) -> Tracker:
    run_dir.mkdir(parents=True)
    record = {"run_name": run_dir.name, "run_key": f"key-{run_dir}", "created_ms": CREATED_MS}
    (run_dir / "run.json").write_text(json.dumps(record))
    tracker = Tracker(
        run_dir,
        TrackingConfig(tracking_uri=server.uri, experiment_name=run_dir.parent.name, offline=True, **config),  # type: ignore[arg-type]
    )
    tracker.start(run_dir.name, {})
    return tracker


def test_run_stays_running_when_synced_during_training(tmp_path: Path, server: MlflowServer) -> None:
    run_dir = tmp_path / "alive" / "it"
    tracker = offline_tracker(run_dir, server)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run_dir / "run.lock"],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        tracker.log_metrics({"loss": 1.0}, 1)
        assert "so far" in deliver_rest(run_dir, None)
        run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
        client = MlflowClient(server.uri)
        assert client.get_run(run_id).info.status == "RUNNING"
        tracker.log_metrics({"loss": 0.5}, 2)
        tracker.finish("FINISHED", "done", 1.0, lambda left: True)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    deliver_rest(run_dir, None)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [point.value for point in client.get_metric_history(run_id, "loss")] == [1.0, 0.5]


def test_run_is_failed_when_its_trainer_died_without_a_word(tmp_path: Path, server: MlflowServer) -> None:
    run_dir = tmp_path / "dead" / "it"
    tracker = offline_tracker(run_dir, server)
    RunLock(run_dir).release()
    tracker.log_metrics({"loss": 1.0}, 1)
    deliver_rest(run_dir, None)
    run_id = json.loads((run_dir / "run.json").read_text())["run_id"]
    assert MlflowClient(server.uri).get_run(run_id).info.status == "FAILED"


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_watch_delivers_what_comes_until_interrupted(
    tmp_path: Path, server: MlflowServer, ending: signal.Signals
) -> None:
    runs = tmp_path / f"watched-{ending.name}"
    with started(harness("sync", "--all", "--watch", "--every_s", "0.5", runs), cwd=tmp_path) as watcher:
        for name in ("first", "second"):
            tracker = offline_tracker(runs / name, server)
            tracker.log_metrics({"loss": 1.0}, 1)
            tracker.finish("FINISHED", "done", 1.0, lambda left: True)
            wait_for(runs / name / "attempts.json", "FINISHED")
        watcher.send_signal(ending)
        assert watcher.wait(timeout=30) == 0
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name(runs.name)
    assert [each.info.status for each in client.search_runs([experiment.experiment_id])] == ["FINISHED"] * 2


def test_children_are_under_one_parent_that_ends_with_the_last_of_them(tmp_path: Path, server: MlflowServer) -> None:
    trackers = [offline_tracker(tmp_path / "sweep" / name, server, parent_run="all of them") for name in "abc"]
    client = MlflowClient(server.uri)
    for number, tracker in enumerate(trackers):
        tracker.log_metrics({"loss": float(number)}, 1)
    held = RunLock(trackers[0].run_dir)
    try:
        # This process still trains the first run.
        deliver_rest(trackers[0].run_dir, None)
        parent_id = client.get_run(_run_id(trackers[0])).data.tags["mlflow.parentRunId"]
        for tracker, status in zip(trackers[1:], ("FINISHED", "FAILED"), strict=True):
            tracker.finish(status, "done", 1.0, lambda left: True)  # type: ignore[arg-type]
            deliver_rest(tracker.run_dir, None)
        assert client.get_run(parent_id).info.status == "RUNNING"
        trackers[0].finish("FINISHED", "done", 1.0, lambda left: True)
        deliver_rest(trackers[0].run_dir, None)
    finally:
        held.release()
    assert {client.get_run(_run_id(each)).data.tags["mlflow.parentRunId"] for each in trackers} == {parent_id}
    parent = client.get_run(parent_id)
    assert (parent.info.status, parent.info.run_name) == ("FAILED", "all of them")
    everything = client.search_runs([parent.info.experiment_id])
    assert len(everything) == 4


def _run_id(tracker: Tracker) -> str:
    found: str = json.loads((tracker.run_dir / "run.json").read_text())["run_id"]
    return found
