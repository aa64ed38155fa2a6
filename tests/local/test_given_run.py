"""Which MLflow run and experiment a training is in, where the user has named one: in a store of sqlite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from mlflow import MlflowClient

from harness import PeriodicLogger
from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.errors import TrackingError
from harness.integrations.accelerate import HarnessTracker
from harness.run.directory import read_run_record
from harness.tracking.mlflow import given_run
from harness.tracking.publisher.sync import deliver_rest
from tests.mlflow_reader import all_runs, client
from tests.services.mlflow_server import make_database
from tests.unit.autologging.loops import Loop


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """A store of its own in the working directory; nothing that MLflow or we keep of it is left."""
    monkeypatch.chdir(tmp_path)
    # Set, so that what `mlflow.set_experiment` sets is taken back.
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    mlflow.set_tracking_uri(make_database(tmp_path / "mlflow.db"))
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    yield client(tmp_path)
    while mlflow.active_run() is not None:
        mlflow.end_run()
    AcceleratorState._reset_state(True)


def train(run_name: str = "it", value: float = 1.0) -> str:
    """A training of one point; returns its MLflow run's id."""
    AcceleratorState._reset_state(True)
    with PeriodicLogger(Accelerator(cpu=True), run_name=run_name) as logger:
        logger.report({"x": value})
        assert logger.mlflow_run_id is not None
        return logger.mlflow_run_id


def made_before(store: MlflowClient, experiment: str = "mine") -> str:
    run_id: str = store.create_run(store.create_experiment(experiment), run_name="made-before").info.run_id
    return run_id


def test_first_named_is_given_when_several_are(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_run.given_run(None) is None
    with mlflow.start_run() as run:
        active = run.info.run_id
        found = given_run.given_run(None)
        assert found == given_run.GivenRun(active, "the active run")
        assert given_run.given_run("sqlite:///elsewhere.db") is None
        with mlflow.start_run(nested=True) as nested:
            assert given_run.is_active(active) and given_run.is_active(nested.info.run_id)
        named = made_before(store)
        monkeypatch.setenv("MLFLOW_RUN_ID", named)
        found = given_run.given_run(None)
        assert found is not None and (found.run_id, found.source) == (named, "MLFLOW_RUN_ID")
        assert active in found.notes[0]
        # A training that could not begin has not used it. After one that has, the next one is not in it.
        assert given_run.given_run(None) == found
        given_run.mark_used(active)
        given_run.mark_used(named)
        assert given_run.given_run(None) == given_run.GivenRun(active, "the active run")
    assert not given_run.is_active(active)


def test_active_run_is_logged_to_and_not_ended_when_the_user_holds_it(store: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("mine")
    with pytest.raises(ValueError, match="later"), mlflow.start_run(run_name="active") as active:
        assert train() == active.info.run_id
        assert store.get_run(active.info.run_id).info.status == "RUNNING"
        mlflow.log_metric("y", 2.0)
        raise ValueError("later")
    (run,) = all_runs(store)
    assert (run.info.run_name, run.info.status) == ("active", "FAILED")
    assert {"x", "y"} <= run.data.metrics.keys()
    assert read_run_record(tmp_path / "runs/it")["experiment_name"] == "mine"


def test_active_run_is_logged_to_when_it_is_accelerates_tracker_that_does(store: MlflowClient) -> None:
    AcceleratorState._reset_state(True)
    with mlflow.start_run() as active:
        accelerator = Accelerator(cpu=True, log_with=HarnessTracker(run_name="it"))
        accelerator.init_trackers("")
        accelerator.log({"x": 1.0}, step=1)
        accelerator.end_training()
        assert store.get_run(active.info.run_id).info.status == "RUNNING"
    (run,) = all_runs(store)
    assert (run.info.status, run.data.metrics["x"]) == ("FINISHED", 1.0)


@pytest.mark.parametrize("ends", ["FAILED", None], ids=["ended-by-the-user", "left-running"])
def test_end_of_the_users_run_stays_when_the_rest_is_delivered_later(
    store: MlflowClient, tmp_path: Path, ends: str | None
) -> None:
    AcceleratorState._reset_state(True)
    active = mlflow.start_run()
    tracking = TrackingConfig(offline=True)
    with PeriodicLogger(Accelerator(cpu=True), run_name="it", tracking=tracking) as logger:
        logger.report({"x": 1.0})
    if ends is not None:
        mlflow.end_run(ends)
    deliver_rest(tmp_path / "runs/it", f"sqlite:///{tmp_path / 'mlflow.db'}")
    run = store.get_run(active.info.run_id)
    assert (run.info.status, run.data.metrics["x"]) == (ends or "FINISHED", 1.0)


def test_run_is_the_named_one_and_ends_when_the_environment_names_it(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = made_before(store)
    monkeypatch.setenv("MLFLOW_RUN_ID", named)
    assert train() == named
    run = store.get_run(named)
    assert (run.info.run_name, run.info.status, run.data.metrics["x"]) == ("made-before", "FINISHED", 1.0)


def test_recorded_run_stays_and_a_line_says_so_when_another_is_named(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded, named = train(), made_before(store)
    monkeypatch.setenv("MLFLOW_RUN_ID", named)
    assert train(value=2.0) == recorded
    shown = "".join(capsys.readouterr())
    assert recorded in shown and named in shown
    assert "x" not in store.get_run(named).data.metrics


def test_error_names_the_variable_when_its_run_is_not_there(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match=f"{'0' * 32}, named by MLFLOW_RUN_ID"):
        train()
    named = made_before(store)
    monkeypatch.setenv("MLFLOW_RUN_ID", named)
    assert train() == named  # nothing is recorded of the other


@pytest.fixture
def autologged(store: MlflowClient, tmp_path: Path) -> Iterator[Loop]:
    """A loop of somebody's, with autologging on."""
    AcceleratorState._reset_state(True)
    settings = AutologSettings(
        CheckpointConfig(every_n_epochs=None), TrackingConfig(log_every_n_steps=None), run_name="it"
    )
    switch = Patcher(settings)
    switch.turn_on()
    yield Loop()
    switch.turn_off()


def test_line_is_said_when_an_autologged_run_is_named_twice(
    store: MlflowClient, autologged: Loop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = made_before(store)
    with mlflow.start_run() as active:
        monkeypatch.setenv("MLFLOW_RUN_ID", named)
        autologged.plain(1)
    line = f"MLFLOW_RUN_ID names MLflow run {named}: the active run {active.info.run_id} is not used"
    assert "".join(capsys.readouterr()).count(line) == 1


def test_error_names_the_variable_when_an_autologged_run_is_not_there(
    autologged: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "1" * 32)
    with pytest.raises(TrackingError, match=f"{'1' * 32}, named by MLFLOW_RUN_ID"):
        autologged.plain(1)


def test_run_is_made_in_the_experiment_when_the_user_has_set_it(store: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("mine")
    run = store.get_run(train())
    assert store.get_experiment(run.info.experiment_id).name == "mine"
    assert read_run_record(tmp_path / "runs/it")["experiment_name"] == "mine"


@pytest.mark.parametrize("is_deleted", [True, False], ids=["deleted", "missing"])
def test_error_names_the_variable_when_its_experiment_cannot_be_used(
    store: MlflowClient, monkeypatch: pytest.MonkeyPatch, is_deleted: bool
) -> None:
    experiment_id = store.create_experiment("mine") if is_deleted else "4711"
    if is_deleted:
        store.delete_experiment(experiment_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
    with pytest.raises(TrackingError, match="MLFLOW_EXPERIMENT_ID"):
        train()


def test_address_that_is_configured_counts_when_a_run_is_active_elsewhere(store: MlflowClient, tmp_path: Path) -> None:
    AcceleratorState._reset_state(True)
    tracking = TrackingConfig(tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    with mlflow.start_run() as active:
        with PeriodicLogger(Accelerator(cpu=True), run_name="it", tracking=tracking) as logger:
            logger.report({"x": 1.0})
        assert logger.mlflow_run_id != active.info.run_id
    assert "x" not in store.get_run(active.info.run_id).data.metrics
