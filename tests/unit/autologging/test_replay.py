"""Autologged scripts that are resumed with other schedules, parameter groups or data."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from harness.errors import DataError
from tests.unit.autologging.loops import On, checkpoints, images

STEPS = 4


def train_with_schedule(num_epochs: int) -> list[float]:
    """The learning rate at each step."""
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = CosineAnnealingLR(optimizer, T_max=STEPS * num_epochs)
    accelerator.register_for_checkpointing(scheduler)
    model, prepared, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(torch.ones(2 * STEPS, 3), batch_size=2), scheduler
    )
    rates = []
    for _ in range(num_epochs):
        for batch in loader:
            accelerator.backward(model(batch).mean())
            prepared.step()
            prepared.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return rates


def test_rates_are_of_the_longer_schedule_when_it_is_reset(on: On) -> None:
    switch = on("whole")
    whole = train_with_schedule(4)
    switch.finish()
    switch = on("cut")
    train_with_schedule(2)
    switch.finish()
    switch = on("cut", reset_scheduler=True)
    # The two completed epochs are replayed with one batch each.
    assert train_with_schedule(4)[2:] == whole[2 * STEPS :]
    switch.finish()


def train_with_added_group(stop_at: tuple[int, int] | None = None) -> Any:
    """Four epochs of three steps; the first layer is unfrozen in the third. Returns the optimizer's state."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    optimizer: Any = torch.optim.AdamW(model[1].parameters(), lr=0.05)
    loader: Any = DataLoader(images(24), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(4):
        if epoch == 2:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
        for number, (inputs, labels) in enumerate(loader):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
            if (epoch, number) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
    return optimizer.state_dict()


@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (2, 0), (3, 1)])
def test_optimizer_state_is_equal_when_resumed_with_an_added_group(
    on: On, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    switch = on("whole")
    whole = train_with_added_group()
    switch.finish()
    on("cut")
    with pytest.raises(SystemExit):
        train_with_added_group(stop_at)
    switch = on("cut")
    resumed = train_with_added_group()
    switch.finish()
    assert resumed["param_groups"] == whole["param_groups"]
    for number, state in whole["state"].items():
        assert all(torch.equal(resumed["state"][number][key], value) for key, value in state.items())
    assert list(checkpoints(tmp_path, "cut"))[-1] == "epoch-0004"


def train_on(num_samples: int, *, num_epochs: int = 4, stop_at: tuple[int, int] | None = None) -> list[int]:
    """Train, and return the number of batches of each epoch."""
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(6, 3)
    loader: DataLoader[list[torch.Tensor]] = DataLoader(images(num_samples), batch_size=8)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), loader)
    counts = []
    for epoch in range(num_epochs):
        counts.append(0)
        for number, (inputs, labels) in enumerate(loader):
            accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
            counts[-1] += 1
            if (epoch, number) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
    return counts


def cut_off_in_second_epoch(on: On) -> None:
    on()
    with pytest.raises(SystemExit):
        train_on(64, stop_at=(1, 5))


@pytest.mark.parametrize(("num_samples", "left"), [(32, 0), (56, 0), (64, 1)])
def test_next_epochs_are_trained_when_the_data_are_shorter(on: On, tmp_path: Path, num_samples: int, left: int) -> None:
    cut_off_in_second_epoch(on)
    switch = on()
    whole = num_samples // 8
    # The first epoch is replayed with one batch.
    assert train_on(num_samples) == [1, left, whole, whole]
    switch.finish()
    # A signal stops the script one step later.
    steps = 15 + left
    found = checkpoints(tmp_path)
    assert [found[f"epoch-000{epoch}"].step for epoch in (2, 3, 4)] == [steps, steps + whole, steps + 2 * whole]


@pytest.mark.parametrize("num_epochs", [2, 4])
def test_resumed_script_fails_when_no_epoch_gives_a_batch(on: On, num_epochs: int) -> None:
    cut_off_in_second_epoch(on)
    switch = on()
    assert train_on(0, num_epochs=num_epochs) == [0] * num_epochs
    with pytest.raises(DataError, match="no batch"):
        switch.finish()


def test_new_script_fails_when_no_epoch_gives_a_batch(on: On) -> None:
    switch = on()
    assert train_on(0) == [0] * 4
    with pytest.raises(DataError, match="no batch"):
        switch.finish()
