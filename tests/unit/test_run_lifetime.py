from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.agreement import Agreement
from harness.checkpoint.commit import Manifest
from harness.config import TrackingConfig
from harness.errors import PeerFailure, Stopped
from harness.progress import Progress
from harness.run_lifetime import RunLifetime
from harness.runtime import Topology
from harness.tracking.outbox import Entry, read_entries

ALONE = Topology("single", 0, 1, 1, "cpu", "CPU", "fp32")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[RunLifetime, Path]]:
    run = RunLifetime(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    _, path = run.open(Agreement(0, 1), tmp_path, "it", {"lr": 0.1}, resume=False)
    yield run, path
    run.finish()


def entries(path: Path, kind: str) -> list[Entry]:
    return [entry for entry in read_entries(path / "outbox") if entry.kind == kind]


def test_points_are_those_of_the_checkpoint_when_training_went_on_before_the_commit(
    opened: tuple[RunLifetime, Path],
) -> None:
    run, path = opened
    run.log_metrics({"train/loss": 0.5, "epoch": 1.0}, 10)
    run.keep_points("epoch-0001", {"train/loss": 0.5})
    run.log_metrics({"train/loss": 0.4}, 20)
    run.publish("epoch-0001", Manifest("k", 1, 10, 0, {"train/loss": 0.5}, (), {}, {}))
    (logged, _) = entries(path, "metrics")
    (published,) = entries(path, "checkpoint")
    # The same value, time and step as the point that was logged: MLflow stores it once.
    assert published.body["metrics"] == [["train/loss", 0.5, logged.time_ms, 10]]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("bad sample"), "FAILED", "ValueError: bad sample"),
        (Stopped("SIGTERM"), "KILLED", "stopped by SIGTERM"),
        (KeyboardInterrupt(), "KILLED", "KeyboardInterrupt: "),
        (PeerFailure(1, "out of memory"), "FAILED", "rank 1 failed: out of memory"),
        (PeerFailure(1, "stopped by SIGINT", "SIGINT"), "KILLED", "rank 1 was stopped by SIGINT"),
    ],
)
def test_end_is_recorded_as_it_was_when_run_fails_by(
    tmp_path: Path, error: BaseException, status: str, reason: str
) -> None:
    run = RunLifetime(ALONE, TrackingConfig(enabled=False), Progress(enabled=False))
    _, path = run.open(Agreement(0, 1), tmp_path, "it", None, resume=False)
    called: list[str] = []
    assert run.fail(error, lambda: called.append("before")) is error
    (end,) = entries(path, "end")
    assert (dict(end.body), called) == ({"status": status, "reason": reason}, ["before"])
