"""A publisher that dies, hangs or is slow: the trainer restarts it, and waits for at most the time limit."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from harness.config.schema import TrackingConfig
from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.publisher import launcher
from harness.tracking.publisher.progress import Remaining
from harness.tracking.publisher.sync import deliver_rest
from harness.tracking.tracker import Tracker
from tests.services.mlflow_server import make_database

pytestmark = pytest.mark.services


def make_tracker(run_dir: Path) -> Tracker:
    (run_dir / "run.json").write_text(json.dumps({"run_name": "it", "run_key": "key-1"}))
    uri = make_database(run_dir / "mlflow.db")
    return Tracker(run_dir, TrackingConfig(tracking_uri=uri, experiment_name="life", start_timeout_s=60.0))


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tracker]:
    """A tracker that checks its publisher more often than usual, with a store on disk."""
    monkeypatch.setattr(launcher, "_CHECK_EVERY_S", 0.5)
    found = make_tracker(tmp_path)
    found.start("it", {})
    yield found
    found.detach()
    process = None if found._publisher is None else found._publisher.process
    if process is not None and process.poll() is None:
        os.kill(process.pid, signal.SIGCONT)
        process.kill()
        process.wait()


def pid_of(tracker: Tracker) -> int:
    assert tracker._publisher is not None and tracker._publisher.process is not None
    return tracker._publisher.process.pid


def train_until_another_publishes(tracker: Tracker, first: int, dead: int) -> int:
    """Log steps until the publisher is replaced; returns the last step."""
    deadline_s = time.monotonic() + 60
    step = first
    while pid_of(tracker) == dead:
        assert time.monotonic() < deadline_s, "the publisher was not started again"
        tracker.log_metrics({"loss": step / 8}, step)
        step += 1
        time.sleep(0.05)  # the pace of a training
    tracker.log_metrics({"loss": step / 8}, step)
    return step


def steps_in_mlflow(tracker: Tracker) -> list[int]:
    assert tracker.run_id is not None
    client = MlflowClient(tracker.config.tracking_uri)
    return sorted(point.step for point in client.get_metric_history(tracker.run_id, "loss"))


@pytest.mark.parametrize("trouble", [signal.SIGKILL, signal.SIGSTOP])
def test_publisher_is_restarted_when_it_dies_or_hangs(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, trouble: signal.Signals
) -> None:
    monkeypatch.setattr(launcher, "DEAD_AFTER_S", 3.0)
    tracker.log_metrics({"loss": 1 / 8}, 1)
    dead = pid_of(tracker)
    os.kill(dead, trouble)
    last = train_until_another_publishes(tracker, 2, dead)
    monkeypatch.setattr(launcher, "DEAD_AFTER_S", 300.0)
    with pytest.raises(ProcessLookupError):
        os.kill(dead, 0)
    assert tracker.finish("FINISHED", "done", 60.0, lambda left: True)
    assert steps_in_mlflow(tracker) == [*range(1, last + 1)]


def test_publisher_is_restarted_when_it_dies_before_it_responds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = launcher.start_publisher
    pids: list[int] = []

    def start(run_dir: Path, settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        process = started(run_dir, settings)
        pids.append(process.pid)
        if len(pids) < 3:
            process.kill()
        return process

    monkeypatch.setattr(launcher, "start_publisher", start)
    found = make_tracker(tmp_path)
    found.start("it", {})
    assert len(pids) == 3
    found.log_metrics({"loss": 1 / 8}, 1)
    assert found.finish("FINISHED", "done", 60.0, lambda left: True)
    assert steps_in_mlflow(found) == [1]


def test_delivery_is_complete_when_the_publisher_is_killed(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = launcher.start_publisher
    errors = iter([OSError(errno.ENOMEM, "no memory for it at first")])

    def start(run_dir: Path, settings: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        for error in errors:
            raise error
        return starts(run_dir, settings)

    monkeypatch.setattr(launcher, "start_publisher", start)
    tracker.log_metrics({"loss": 1 / 8}, 1)
    os.kill(pid_of(tracker), signal.SIGKILL)
    assert tracker.finish("FINISHED", "done", 60.0, lambda left: True)
    assert steps_in_mlflow(tracker) == [1]


def test_publisher_is_not_restarted_when_it_is_slow(tracker: Tracker, tmp_path: Path) -> None:
    """A publisher that waits for its store has a heartbeat. It also ignores the signal that stops a job."""
    store = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    slow = pid_of(tracker)
    store.execute("BEGIN EXCLUSIVE")
    os.kill(slow, signal.SIGTERM)
    for step in range(1, 40):
        tracker.log_metrics({"loss": step / 8}, step)
        time.sleep(0.05)
    store.execute("ROLLBACK")
    store.close()
    assert pid_of(tracker) == slow
    assert tracker.finish("FINISHED", "done", 60.0, lambda left: True)
    assert steps_in_mlflow(tracker) == [*range(1, 40)]


def test_finish_returns_in_time_when_the_store_is_unreachable(tracker: Tracker, tmp_path: Path) -> None:
    seen: list[Remaining] = []
    store = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    store.execute("BEGIN EXCLUSIVE")
    for step in range(1, 200):
        tracker.log_metrics({"loss": step / 8}, step)
    begun_s = time.monotonic()
    assert not tracker.finish("FINISHED", "done", 2.0, lambda left: seen.append(left) is None)
    assert 1.9 < time.monotonic() - begun_s < 5
    assert len(seen) > 2
    assert {left.share for left in seen} == {0.0}
    assert seen[0].size_bytes > 10_000
    store.execute("ROLLBACK")
    store.close()
    # The publisher is still running, because it lingers.
    deliver_rest(tmp_path, None)
    assert steps_in_mlflow(tracker) == [*range(1, 200)]


def test_delivery_is_complete_when_the_store_recovers(tracker: Tracker, tmp_path: Path) -> None:
    store = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)
    store.execute("BEGIN EXCLUSIVE")
    for step in range(1, 200):
        tracker.log_metrics({"loss": step / 8}, step)
    comes_back = threading.Timer(2.0, lambda: store.execute("ROLLBACK"))
    comes_back.start()
    shares: list[float] = []
    assert tracker.finish("FINISHED", "done", 60.0, lambda left: shares.append(left.share) is None)
    comes_back.join()
    store.close()
    assert shares[0] == 0.0
    assert sorted(shares) == shares
    assert read_delivered(tmp_path / "outbox").ended
    assert steps_in_mlflow(tracker) == [*range(1, 200)]
