"""Several trainings in one process: each has a run of its own, and a script that is run again finds each of them."""

from __future__ import annotations

import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, find_executable_batch_size, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.autologging import api
from harness.autologging.settings import AutologSettings
from harness.checkpoint.format.commit import list_checkpoints
from harness.errors import RunDirError
from tests.unit.autologging.loops import On, switching


@pytest.fixture
def on(tmp_path: Path) -> Iterator[On]:
    """Puts autologging on, in runs below `runs` in the test's directory; it is off again afterwards."""
    yield from switching(tmp_path / "runs", "x")


def runs(directory: Path) -> dict[str, list[tuple[str, int]]]:
    """Name of each run -> its checkpoints, and their steps."""
    return {
        path.name: [(name, manifest.step) for name, manifest in list_checkpoints(path / "checkpoints")]
        for path in sorted((directory / "runs").iterdir())
    }


EPOCHS = [("epoch-0001", 5), ("epoch-0002", 10)]


def net() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def samples(batch_size: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.arange(40) % 3)
    return DataLoader(data, batch_size=batch_size, shuffle=True)


def step(accelerator: Accelerator, model: nn.Module, optimizer: Any, batch: Any) -> float:
    inputs, labels = batch
    loss = nn.functional.cross_entropy(model(inputs), labels)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(accelerator: Accelerator, prepared: Any, num_epochs: int = 2) -> list[float]:
    model, optimizer, loader = prepared
    losses = []
    for _ in range(num_epochs):
        losses += [step(accelerator, model, optimizer, batch) for batch in loader]
    return losses


def validate_across(
    num_folds: int = 3, *, frees: bool = False, stops: Callable[[int, int], None] = lambda fold, epoch: None
) -> list[dict[str, Tensor]]:
    """A cross-validation; the weights that each fold ends with."""
    accelerator = Accelerator(cpu=True)
    set_seed(1)
    ends = []
    for fold in range(num_folds):
        prepared = accelerator.prepare(*net(), samples())
        for epoch in range(2):
            train(accelerator, prepared, 1)
            stops(fold, epoch)
        ends.append({name: each.clone() for name, each in prepared[0].state_dict().items()})
        if frees:
            accelerator.free_memory()
    return ends


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_each_fold_has_a_run_of_its_own_when_the_run_has_a_name(on: On, tmp_path: Path, resume: str) -> None:
    plain = validate_across()
    switch = on(resume=resume)
    logged = validate_across()
    switch.finish()
    assert runs(tmp_path) == {"x": EPOCHS, "x-2": EPOCHS, "x-3": EPOCHS}
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, logged, strict=True) for name in a)


def test_fold_runs_are_named_after_the_first_when_it_is_generated(on: On, tmp_path: Path) -> None:
    switch = on(None)
    validate_across()
    switch.finish()
    first, *others = runs(tmp_path)
    assert others == [f"{first}-2", f"{first}-3"]


def test_folds_end_equal_when_the_third_is_interrupted_and_resumed(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No fold sets a seed: its weights are those that the random numbers give which the fold before has left."""

    def stops(fold: int, epoch: int) -> None:
        if (fold, epoch) == (2, 0):
            os.kill(os.getpid(), signal.SIGTERM)

    whole = validate_across(4, frees=True)
    on()
    with pytest.raises(SystemExit):
        validate_across(4, frees=True, stops=stops)
    assert list(runs(tmp_path)) == ["x", "x-2", "x-3"]
    switch = on()
    resumed = validate_across(4, frees=True)
    switch.finish()
    assert capfd.readouterr().err.count("first 2 epochs are complete") == 2
    assert runs(tmp_path)["x-4"] == EPOCHS
    assert all(torch.equal(a[name], b[name]) for a, b in zip(whole, resumed, strict=True) for name in a)


def test_first_training_is_resumed_when_a_later_run_is_named(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fold: int, epoch: int) -> None:
        if fold == 1:
            raise KeyError("x")

    switch = on()
    with pytest.raises(KeyError) as error:
        validate_across(2, stops=fails)
    switch.fail(error.value)
    directory = tmp_path / "runs"
    assert f"it goes on with `harness run --resume {directory / 'x'}` and" in capfd.readouterr().err
    monkeypatch.setattr(api, "_settings", AutologSettings())
    for name in ("x", "x-2"):
        api.resume(str(directory / name))
        assert (api._settings.run_name, api._settings.run_dir) == ("x", str(directory))


def test_numbers_start_at_one_when_another_name_is_given(on: On, tmp_path: Path) -> None:
    switch = on()
    validate_across(2)
    switch.change(AutologSettings(**{**vars(switch.settings), "run_name": "y"}))
    validate_across(2)
    switch.finish()
    assert list(runs(tmp_path)) == ["x", "x-2", "y", "y-2"]


def test_second_training_starts_new_when_a_checkpoint_is_named(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on("before")
    validate_across(1)
    switch.finish()
    checkpoint = str(tmp_path / "runs" / "before" / "checkpoints" / "epoch-0001")
    switch = on(resume=checkpoint)
    validate_across(2)
    switch.finish()
    assert runs(tmp_path)["x"] == EPOCHS[1:]
    assert runs(tmp_path)["x-2"] == EPOCHS
    assert f"x-2 starts from the script's own weights: {checkpoint} is used for the first" in capfd.readouterr().err


# ---------------------------------------------------------------------- attempts


def attempts(accelerator: Accelerator, fails_at: tuple[int, int]) -> None:
    @find_executable_batch_size(starting_batch_size=10)
    def inner(batch_size: int) -> None:
        accelerator.free_memory()
        model, optimizer, loader = accelerator.prepare(*net(), samples(batch_size))
        for epoch in range(2):
            for number, batch in enumerate(loader):
                if batch_size == 10 and (epoch, number) == fails_at:
                    raise RuntimeError("CUDA out of memory.")
                step(accelerator, model, optimizer, batch)

    inner()


def test_attempt_makes_no_epoch_when_memory_is_out_within_it(
    on: On, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    switch = on()
    attempts(Accelerator(cpu=True), (0, 2))
    switch.finish()
    assert runs(tmp_path) == {"x": [], "x-2": [("epoch-0001", 5), ("epoch-0002", 10)]}
    assert "the attempt of run x has failed; the next attempt is run x-2" in capfd.readouterr().err


def test_attempts_have_own_runs_when_the_script_is_resumed(on: On, tmp_path: Path) -> None:
    for _ in range(2):
        switch = on()
        attempts(Accelerator(cpu=True), (1, 2))
        switch.finish()
        # Nine samples each: the second attempt has neither the first one's weights nor its epochs.
        assert runs(tmp_path) == {"x": [("epoch-0001", 4)], "x-2": EPOCHS}


def test_memory_of_an_attempt_is_free_when_the_next_one_begins(on: On) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    alive: list[bool] = []
    before: list[Any] = []

    @find_executable_batch_size(starting_batch_size=10)
    def inner(batch_size: int) -> None:
        accelerator.free_memory()
        gc.collect()
        alive.extend(each() is not None for each in before)
        model, optimizer, loader = accelerator.prepare(*net(), samples(batch_size))
        before.append(weakref.ref(model))
        for batch in loader:
            step(accelerator, model, optimizer, batch)
            if batch_size == 10:
                raise RuntimeError("CUDA out of memory.")

    inner()
    switch.finish()
    assert alive == [False]


def test_outer_model_stays_prepared_when_an_attempt_fails(on: On, tmp_path: Path) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*net())

    @find_executable_batch_size(starting_batch_size=10)
    def inner(batch_size: int) -> None:
        loader = accelerator.prepare(samples(batch_size))
        for number, batch in enumerate(loader):
            if batch_size == 10 and number == 2:
                raise RuntimeError("CUDA out of memory.")
            step(accelerator, model, optimizer, batch)

    inner()
    switch.finish()
    assert runs(tmp_path) == {"x": [], "x-2": EPOCHS[:1]}


@pytest.mark.parametrize("training", ["outside", "around", "before"])
def test_training_continues_when_an_evaluation_is_retried(on: On, tmp_path: Path, training: str) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    sizes: list[int] = []

    @find_executable_batch_size(starting_batch_size=10)
    def evaluate(batch_size: int, model: nn.Module) -> None:
        for inputs, _ in accelerator.prepare(samples(batch_size)):
            sizes.append(len(inputs))
            if batch_size == 10:
                raise RuntimeError("CUDA out of memory.")
            with torch.no_grad():
                model(inputs)

    def train_and_evaluate(batch_size: int = 8, *, evaluates: bool = True) -> Any:
        prepared = accelerator.prepare(*net(), samples(batch_size))
        for _ in range(2):
            train(accelerator, prepared, 1)
            if evaluates:
                evaluate(prepared[0])
        return prepared

    attempted = find_executable_batch_size(train_and_evaluate, starting_batch_size=8)
    if training == "before":
        evaluate(attempted(evaluates=False)[0])
    else:
        (attempted if training == "around" else train_and_evaluate)()
    switch.finish()
    assert sizes.count(10) == 1
    assert runs(tmp_path) == {"x": EPOCHS}


# ---------------------------------------------------------------------- what is prepared later


def a_frozen_module(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(nn.Linear(3, 3).requires_grad_(False).eval())


def a_criterion(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(nn.CrossEntropyLoss())


def an_average_of_the_weights(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(torch.optim.swa_utils.AveragedModel(accelerator.unwrap_model(model)))


def the_same_model(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(accelerator.unwrap_model(model))


def the_same_model_in_another_wrapper(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(nn.DataParallel(model))


def a_loader(accelerator: Accelerator, model: nn.Module) -> None:
    accelerator.prepare(samples())


@pytest.mark.parametrize(
    "prepare",
    [
        a_frozen_module,
        a_criterion,
        an_average_of_the_weights,
        the_same_model,
        the_same_model_in_another_wrapper,
        a_loader,
    ],
)
def test_training_continues_when_the_script_prepares(
    on: On, tmp_path: Path, prepare: Callable[[Accelerator, nn.Module], None]
) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*net(), samples())
    for _ in range(2):
        for number, batch in enumerate(loader):
            step(accelerator, model, optimizer, batch)
            if number == 2:
                prepare(accelerator, model)
        prepare(accelerator, model)
    switch.finish()
    assert runs(tmp_path) == {"x": EPOCHS}


@pytest.mark.parametrize("pieces", ["model first", "optimizer first", "each by its own method"])
def test_next_training_begins_when_a_model_is_prepared_in_pieces(on: On, tmp_path: Path, pieces: str) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    for _ in range(2):
        model, optimizer = net()
        if pieces == "optimizer first":
            optimizer = accelerator.prepare(optimizer)
            model, loader = accelerator.prepare(model, samples())
        elif pieces != "model first":
            loader = accelerator.prepare_data_loader(data_loader=samples())
            model, optimizer = accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer)
        else:
            model, loader = accelerator.prepare(model), accelerator.prepare(samples())
            optimizer = accelerator.prepare(optimizer)
        train(accelerator, (model, optimizer, loader))
    switch.finish()
    assert runs(tmp_path) == {"x": EPOCHS, "x-2": EPOCHS}


def test_epochs_are_replayed_when_objects_are_prepared_one_by_one(on: On, tmp_path: Path) -> None:
    for num_epochs, num_batches in ((2, 10), (3, 2 + 5)):
        switch = on()
        accelerator = Accelerator(cpu=True)
        model, optimizer = net()
        loader = accelerator.prepare_data_loader(samples())
        prepared = accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer), loader
        losses = train(accelerator, prepared, num_epochs)
        switch.finish()
        assert len(losses) == num_batches
    assert runs(tmp_path) == {"x": [*EPOCHS, ("epoch-0003", 15)]}


def test_model_is_not_trained_when_prepared_for_evaluation(on: On, tmp_path: Path) -> None:
    switch = on()
    accelerator = Accelerator(cpu=True)
    accelerator.prepare_model(net()[0], evaluation_mode=True)
    train(accelerator, accelerator.prepare(*net(), samples()))
    switch.finish()
    assert runs(tmp_path) == {"x": EPOCHS}


def test_folds_share_a_loader_when_it_is_prepared_once(on: On, tmp_path: Path) -> None:
    for num_epochs, trained in ((1, [5, 5]), (2, [6, 6])):
        switch = on()
        accelerator = Accelerator(cpu=True)
        loader = accelerator.prepare(samples())
        losses = [train(accelerator, (*accelerator.prepare(*net()), loader), num_epochs) for _ in range(2)]
        switch.finish()
        assert [len(each) for each in losses] == trained
    assert runs(tmp_path) == {"x": EPOCHS, "x-2": EPOCHS}


# ---------------------------------------------------------------------- states that the script saves


@pytest.mark.parametrize("total_limit", [None, 2])
def test_saved_states_are_equal_when_the_script_is_resumed(on: On, tmp_path: Path, total_limit: int | None) -> None:
    def script(directory: str, num_epochs: int, stop_at: int | None = None) -> list[str]:
        project = ProjectConfiguration(
            str(tmp_path / directory), automatic_checkpoint_naming=True, total_limit=total_limit
        )
        accelerator = Accelerator(cpu=True, project_config=project)
        prepared = accelerator.prepare(*net(), samples())
        names = []
        for epoch in range(num_epochs):
            if epoch == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            train(accelerator, prepared, 1)
            names.append(accelerator.save_state().name)
        return names

    def there(directory: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / directory / "checkpoints").iterdir())

    whole = script("whole", 5)
    on()
    with pytest.raises(SystemExit):
        script("cut", 5, 3)
    switch = on()
    assert script("cut", 5) == whole
    switch.finish()
    assert there("cut") == there("whole")


def test_state_numbers_continue_when_saved_after_the_checkpoint(on: On, tmp_path: Path) -> None:
    for num_epochs, names in ((2, ["checkpoint_0", "checkpoint_1"]), (3, ["checkpoint_0", "checkpoint_1"])):
        switch = on()
        project = ProjectConfiguration(str(tmp_path / "project"), automatic_checkpoint_naming=True)
        accelerator = Accelerator(cpu=True, project_config=project)
        prepared = accelerator.prepare(*net(), samples())
        saved = []
        for _ in range(num_epochs):
            train(accelerator, prepared, 1)
            saved.append(accelerator.save_state().name)
        switch.finish()
        (tmp_path / "project" / "checkpoints" / "checkpoint_2").mkdir(exist_ok=True)
        assert saved == (names if num_epochs == 2 else [*names, "checkpoint_3"])


def test_save_state_returns_its_directory_when_replayed(on: On, tmp_path: Path) -> None:
    for num_epochs in (1, 3):
        switch = on()
        accelerator = Accelerator(cpu=True)
        prepared = accelerator.prepare(*net(), samples())
        for epoch in range(num_epochs):
            train(accelerator, prepared, 1)
            assert accelerator.save_state(str(tmp_path / f"state{epoch}")) == tmp_path / f"state{epoch}"
        switch.finish()


def test_run_is_refused_when_the_name_of_a_later_one_exists(on: On, tmp_path: Path) -> None:
    switch = on("x-2")
    validate_across(1)
    switch.finish()
    on(resume="never")
    with pytest.raises(RunDirError, match="x-2 holds a run already"):
        validate_across(2)


def test_gradients_are_clipped_when_replayed_in_half_precision(on: On, tmp_path: Path) -> None:
    def script(num_epochs: int, stop_at: int | None = None) -> dict[str, Tensor]:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        set_seed(1)
        model, optimizer, loader = accelerator.prepare(*net(), samples())
        for epoch in range(num_epochs):
            if epoch == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            for inputs, labels in loader:
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return {name: each.clone() for name, each in model.state_dict().items()}

    whole = script(3)
    on()
    with pytest.raises(SystemExit):
        script(3, 2)
    switch = on()
    resumed = script(3)
    switch.finish()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
