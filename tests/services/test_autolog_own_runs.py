"""MLflow runs that a script begins itself, around each of its trainings: those are the trainings' runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import find_executable_batch_size
from mlflow.entities import Run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from tests.mlflow_reader import all_runs, client, history
from tests.services.mlflow_server import make_database

On = Callable[[], Patcher]


@pytest.fixture
def on(tmp_path: Path) -> Iterator[On]:
    """Autologging into a store of the test's own, in a run of this name; the earlier one is off then."""
    made: list[Patcher] = []
    before = mlflow.get_tracking_uri()
    uri = make_database(tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(uri)

    def turn_on() -> Patcher:
        for earlier in made:
            earlier.turn_off()
        AcceleratorState._reset_state(True)
        tracking = TrackingConfig(tracking_uri=uri, log_models=False, log_every_n_steps=None)
        made.append(
            Patcher(
                AutologSettings(
                    CheckpointConfig(every_n_epochs=1), tracking, False, "x", str(tmp_path / "runs"), "auto"
                )
            )
        )
        made[-1].turn_on()
        return made[-1]

    yield turn_on
    for switch in made:
        switch.turn_off()
    mlflow.set_tracking_uri(before)
    AcceleratorState._reset_state(True)


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def samples(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(16, 3), torch.ones(16, 1)), batch_size=batch_size)


def train(accelerator: Accelerator, prepared: Any, num_epochs: int = 2, *, fails: bool = False) -> None:
    model, optimizer, loader = prepared
    for epoch in range(num_epochs):
        for inputs, labels in loader:
            accelerator.backward(nn.functional.mse_loss(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
            if fails:
                raise RuntimeError("CUDA out of memory.")
        mlflow.log_metric("val", float(epoch), step=epoch)


def found(directory: Path) -> dict[str, Run]:
    return {str(run.info.run_name): run for run in all_runs(client(directory))}


def steps(directory: Path, run: Run, key: str) -> list[int]:
    return [point.step for point in history(client(directory), run, key)]


def trials(names: Sequence[str], *, is_nested: bool = False, num_epochs: int = 2) -> None:
    accelerator = Accelerator(cpu=True)
    with mlflow.start_run(run_name="study") if is_nested else nullcontext():
        for name in names:
            with mlflow.start_run(run_name=name, nested=is_nested):
                mlflow.log_param("trial", name)
                train(accelerator, accelerator.prepare(*net(), samples()), num_epochs)
            if is_nested:
                mlflow.log_metric("num_trials", 1.0, step=int(name[-1]))


@pytest.mark.parametrize("is_nested", [False, True])
def test_each_trial_is_its_own_run_when_the_script_begins_one_for_each(on: On, tmp_path: Path, is_nested: bool) -> None:
    """And is so again when the script is run once more, with an epoch more in its trials."""
    names, ids = ["trial0", "trial1"], dict[str, str]()
    for num_epochs in (1, 2):
        switch = on()
        trials(names, is_nested=is_nested, num_epochs=num_epochs)
        switch.finish()
        runs = found(tmp_path)
        assert set(runs) == {*names, *(["study"] if is_nested else [])}
        assert ids.items() <= {name: run.info.run_id for name, run in runs.items()}.items()
        ids = {name: run.info.run_id for name, run in runs.items()}
        for name in names:
            run = runs[name]
            assert run.info.status == "FINISHED"
            assert run.data.params["trial"] == name
            assert steps(tmp_path, run, "val") == list(range(num_epochs))
            assert steps(tmp_path, run, "train/loss") == [2, 4][:num_epochs]
            assert run.data.tags.get("mlflow.parentRunId") == ids.get("study")
    if is_nested:
        assert steps(tmp_path, runs["study"], "val") == []
        assert set(steps(tmp_path, runs["study"], "num_trials")) == {0, 1}


def test_training_stays_in_its_run_when_the_script_starts_another(on: On, tmp_path: Path) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(*net(), samples())
    for name in ("first", "second"):
        with mlflow.start_run(run_name=name):
            train(accelerator, prepared, 1)
    switch.finish()
    runs = found(tmp_path)
    assert set(runs) == {"first", "second"}
    assert [steps(tmp_path, runs[name], "train/loss") for name in ("first", "second")] == [[2, 4], []]
    assert [steps(tmp_path, runs[name], "val") for name in ("first", "second")] == [[0], [0]]


def test_later_run_is_the_scripts_own_when_training_has_ended(on: On, tmp_path: Path) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    with mlflow.start_run(run_name="training"):
        train(accelerator, accelerator.prepare(*net(), samples()), 1)
        accelerator.end_training()
    with mlflow.start_run(run_name="report"):
        mlflow.log_metric("test", 1.0)
    switch.finish()
    runs = found(tmp_path)
    assert {name: steps(tmp_path, run, "test") for name, run in runs.items()} == {"training": [], "report": [0]}


@pytest.mark.parametrize("is_within", [False, True])
def test_failed_attempt_ends_no_run_of_the_scripts_when_that_goes_on(
    on: On, tmp_path: Path, is_within: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    active: list[str] = []

    @find_executable_batch_size(starting_batch_size=8)
    def inner(batch_size: int) -> None:
        accelerator.free_memory()
        with mlflow.start_run(run_name=f"by {batch_size}") if is_within else nullcontext():
            run = mlflow.active_run()
            active.append("" if run is None else run.info.run_name)
            prepared = accelerator.prepare(*net(), samples(batch_size))
            train(accelerator, prepared, 1, fails=batch_size == 8)

    with nullcontext() if is_within else mlflow.start_run(run_name="whole"):
        inner()
    switch.finish()
    runs = found(tmp_path)
    assert active == (["by 8", "by 7"] if is_within else ["whole", "whole"])
    ends = {name: (run.info.status, run.data.tags["harness.end_reason"]) for name, run in runs.items()}
    failed, complete = ("FAILED", "RuntimeError: CUDA out of memory."), ("FINISHED", "training is complete")
    assert ends == ({"by 8": failed, "by 7": complete} if is_within else {"whole": complete})
    last = runs["by 7" if is_within else "whole"]
    assert steps(tmp_path, last, "val") == [0]
    told = capfd.readouterr().err
    assert last.data.params["training.batch_size"] == ("7" if is_within else "8")
    assert ("this training differs in training.batch_size=7" in told) is not is_within
    assert "refused" not in told
