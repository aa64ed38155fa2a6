"""Ranks that train two folds, of which the second does not fit into memory at first, and then all of it once more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, find_executable_batch_size
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from tests.distributed.saving_ranks import become_rank


def train_folds(rank: int, world_size: int, port: int, directory: Path) -> None:
    """As a script does that is run with two epochs, and then with three; what it saved in ``saved-<rank>.json``."""
    become_rank(rank, world_size, port)
    saved: list[list[str]] = []
    for num_epochs in (2, 3):
        checkpoint, tracking = CheckpointConfig(every_n_epochs=1), TrackingConfig(enabled=False)
        switch = Patcher(AutologSettings(checkpoint, tracking, False, "x", str(directory / "runs"), "auto"))
        switch.turn_on()
        accelerator = Accelerator(
            cpu=True, project_config=ProjectConfiguration(str(directory), automatic_checkpoint_naming=True)
        )
        saved.append([])
        for fold in range(2):
            _train(accelerator, fold, num_epochs, saved[-1])
        switch.turn_off()
    (directory / f"saved-{rank}.json").write_text(json.dumps(saved))


def _train(accelerator: Accelerator, fold: int, num_epochs: int, saved: list[str]) -> None:
    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> None:
        accelerator.free_memory()
        model: Any = nn.Linear(6, 3)
        optimizer: Any = torch.optim.AdamW(model.parameters())
        data = TensorDataset(torch.ones(64, 6), torch.arange(64) % 3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=batch_size))
        for _ in range(num_epochs):
            for number, (inputs, labels) in enumerate(loader):
                if (fold, batch_size, number) == (1, 8, 2):
                    raise RuntimeError(f"CUDA out of memory. GPU {accelerator.process_index}")
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
            if fold == 0:
                saved.append(accelerator.save_state().name)
            # Another wrapper around the same model.
            model = accelerator.prepare(accelerator.unwrap_model(model))

    train()
