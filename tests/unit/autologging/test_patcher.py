"""Where a training is no longer autologging's: it is turned off, or the process is a child of the one that trains."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.autologging import api, patcher
from harness.autologging.settings import AutologSettings
from harness.checkpoint.format.commit import list_checkpoints
from harness.config.schema import TrackingConfig


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "_settings", AutologSettings(tracking=TrackingConfig(enabled=False), run_name="run"))
    AcceleratorState._reset_state(True)
    yield
    patcher.turn_off()
    AcceleratorState._reset_state(True)


def train(during: Callable[[Accelerator, int], None] = lambda accelerator, number: None) -> tuple[list[float], Any]:
    """Two epochs of five batches, with a call at each; the losses, and the loader."""
    set_seed(1)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(torch.randn(40, 6), torch.arange(40) % 3), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for _ in range(2):
        for inputs, labels in loader:
            during(accelerator, len(losses))
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, loader


def test_loader_is_restored_when_turned_off_within_an_iteration(tmp_path: Path) -> None:
    def turn_off(accelerator: Accelerator, number: int) -> None:
        if number == 7:
            api.autolog(disable=True)

    plain, as_it_is = train()
    AcceleratorState._reset_state(True)
    api.autolog(every_n_epochs=1)
    losses, loader = train(turn_off)
    assert losses == plain
    base, plain_base = loader.base_dataloader, as_it_is.base_dataloader
    assert type(base.batch_sampler) is type(plain_base.batch_sampler)
    assert len(list(copy.deepcopy(base))) == 5
    names = [name for name, _ in list_checkpoints(tmp_path / "runs" / "run" / "checkpoints")]
    assert names == ["epoch-0001", "step-00000007"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_training_stays_the_parents_when_a_child_prepares_a_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = []

    def fork(accelerator: Accelerator, number: int) -> None:
        if number == 7:
            child = multiprocessing.get_context("fork").Process(target=lambda: accelerator.prepare(nn.Linear(2, 2)))
            child.start()
            child.join(30)
            child.kill()
            codes.append(child.exitcode)

    plain, _ = train()
    AcceleratorState._reset_state(True)
    api.autolog(every_n_epochs=1)
    losses, _ = train(fork)
    patcher.turn_off()
    assert codes == [0]
    assert losses == plain
    names = [name for name, _ in list_checkpoints(tmp_path / "runs" / "run" / "checkpoints")]
    assert names == ["epoch-0001", "epoch-0002"]
    told = capfd.readouterr().err
    assert (told.count("2 checkpoints in"), told.count("harness: autolog:")) == (1, 0)
