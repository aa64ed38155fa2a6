"""Autologged scripts whose data are shorter where the run is resumed, or give nothing at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from harness.errors import DataError
from tests.unit.autologging.loops import On, checkpoints, images


def train(num_samples: int, *, num_epochs: int = 4, stop_at: tuple[int, int] | None = None) -> list[int]:
    """How many batches each epoch had."""
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
        train(64, stop_at=(1, 5))


@pytest.mark.parametrize(("num_samples", "left"), [(32, 0), (56, 0), (64, 1)])
def test_next_epochs_are_trained_when_the_data_end_before_the_position(
    on: On, tmp_path: Path, num_samples: int, left: int
) -> None:
    cut_off_in_second_epoch(on)
    switch = on()
    whole = num_samples // 8
    # The first epoch goes by with one batch.
    assert train(num_samples) == [1, left, whole, whole]
    switch.finish()
    # A signal stops the script one step later.
    steps = 15 + left
    found = checkpoints(tmp_path)
    assert [found[f"epoch-000{epoch}"].step for epoch in (2, 3, 4)] == [steps, steps + whole, steps + 2 * whole]


@pytest.mark.parametrize("num_epochs", [2, 4])
def test_resumed_script_fails_when_no_epoch_gives_a_batch(on: On, num_epochs: int) -> None:
    cut_off_in_second_epoch(on)
    switch = on()
    assert train(0, num_epochs=num_epochs) == [0] * num_epochs
    with pytest.raises(DataError, match="no batch"):
        switch.finish()


def test_new_script_fails_when_no_epoch_gives_a_batch(on: On) -> None:
    switch = on()
    assert train(0) == [0] * 4
    with pytest.raises(DataError, match="no batch"):
        switch.finish()
