"""Ranks that train apart for some steps, and then average their weights, as in accelerate's example of LocalSGD."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import harness
from tests.distributed.saving_ranks import become_rank

NUM_EPOCHS = 2


def train_apart(rank: int, world_size: int, port: int, directory: Path) -> None:
    """Two epochs; what the rank had as losses, by epoch, in ``told-<rank>.json``, what it wrote in ``said-<rank>``."""
    become_rank(rank, world_size, port)
    os.chdir(directory)
    said = os.open(f"said-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    harness.autolog(every_n_epochs=1)
    accelerator = Accelerator(cpu=True)
    set_seed(3)
    data = DataLoader(TensorDataset(torch.randn(32, 3), torch.randn(32, 1)), batch_size=4)
    model: Any = nn.Linear(3, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data)
    losses: list[list[float]] = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local_sgd:
        for _ in range(NUM_EPOCHS):
            losses.append([])
            for inputs, targets in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.mse_loss(model(inputs), targets)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()
                losses[-1].append(loss.item())
    accelerator.end_training()
    Path(f"told-{rank}.json").write_text(json.dumps(losses))
