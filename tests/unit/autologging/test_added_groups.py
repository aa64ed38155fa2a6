"""An autologged script that adds a parameter group in mid-training goes on as if it had not been cut off."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from tests.unit.autologging.loops import On, checkpoints, images


def train(stop_at: tuple[int, int] | None = None) -> Any:
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
def test_optimizer_ends_as_if_never_stopped_when_a_group_is_added(
    on: On, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    switch = on("whole")
    whole = train()
    switch.finish()
    on("cut")
    with pytest.raises(SystemExit):
        train(stop_at)
    switch = on("cut")
    resumed = train()
    switch.finish()
    assert resumed["param_groups"] == whole["param_groups"]
    for number, state in whole["state"].items():
        assert all(torch.equal(resumed["state"][number][key], value) for key, value in state.items())
    assert list(checkpoints(tmp_path, "cut"))[-1] == "epoch-0004"
