"""An autologged script that is resumed for more epochs, with the schedule that it makes of their number."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from tests.unit.autologging.loops import On

STEPS = 4


def train(num_epochs: int) -> list[float]:
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


def test_learning_rates_are_those_of_the_longer_schedule_when_it_is_reset(on: On) -> None:
    switch = on("whole")
    whole = train(4)
    switch.finish()
    switch = on("cut")
    train(2)
    switch.finish()
    switch = on("cut", reset_scheduler=True)
    # Two epochs that are done go by with one batch each.
    assert train(4)[2:] == whole[2 * STEPS :]
    switch.finish()
