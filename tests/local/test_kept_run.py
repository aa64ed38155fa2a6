"""A run that an earlier version has begun: `kept/<commit>.tar.xz`, made by that commit with `harness train`.

Each archive holds a directory with ``runs/kept`` (6 checkpoints, journal, delivery state), ``mlflow.db``, ``mlruns``
and the configuration. Trainer and publisher were killed in epoch 13 of 30, before 5 checkpoints and the metrics since
step 280 were delivered. `_ROOT` stands for the directory in which the run was made.
"""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path

import pytest

from tests.launching import harness, run
from tests.mlflow_reader import client, history, models, only_run

KEPT = Path(__file__).parent / "kept"
_ROOT = "/srv/kept/run"
_EPOCHS = range(2, 13, 2)
# Where the store keeps absolute paths.
_COLUMNS = (("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"))


@pytest.fixture(params=[path.name.partition(".")[0] for path in sorted(KEPT.iterdir())])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The run as its version left it, moved into a temporary directory."""
    with tarfile.open(KEPT / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for record in (tmp_path / "runs/kept/run.json", tmp_path / "runs/kept/outbox/settings.json"):
        record.write_text(record.read_text().replace(_ROOT, str(tmp_path)))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        for table, column in _COLUMNS:
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (_ROOT, str(tmp_path)))
    return tmp_path


def succeed(words: list[str], cwd: Path) -> str:
    done = run(harness(*words), cwd)
    assert done.code == 0, done.output
    return done.output


def require_delivered(cwd: Path, last_epoch: int) -> None:
    """Fail unless MLflow has each point and each model of the run's epochs exactly once, in the run of before."""
    reader, found = client(cwd), only_run(cwd)
    assert found.info.run_id == json.loads((cwd / "runs/kept/run.json").read_text())["run_id"]
    for key in ("train/loss", "eval/loss", "eval/accuracy"):
        points = history(reader, found, key)
        assert len({point.step for point in points}) == len(points)
    # One evaluation an epoch of 89 steps.
    assert [point.step for point in points] == [89 * epoch for epoch in range(1, last_epoch + 1)]
    steps = [int(model.tags["step"]) for model in models(reader, found)]
    assert steps == [89 * epoch for epoch in range(2, last_epoch + 1, 2)]


def test_run_is_listed_verified_and_synced_when_an_earlier_version_made_it(directory: Path) -> None:
    listed = json.loads(succeed(["checkpoints", "runs/kept", "--json"], directory))
    assert [each["epoch"] for each in listed] == list(_EPOCHS)
    for epoch in _EPOCHS:
        succeed(["verify", f"runs/kept/checkpoints/epoch-{epoch:04d}"], directory)
    assert "exp_avg" in succeed(["inspect", "runs/kept/checkpoints/epoch-0012"], directory)
    succeed(["sync", "runs/kept"], directory)
    require_delivered(directory, 12)


def test_run_is_resumed_when_an_earlier_version_began_it(directory: Path) -> None:
    output = succeed(["train", "--config", "runs/kept/config.yaml", "--trainer.max_epochs", "14"], directory)
    assert "epoch  13" in output and "epoch  12" not in output
    require_delivered(directory, 14)
