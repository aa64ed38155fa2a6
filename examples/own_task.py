"""A task of your own for `harness train`: a class with four methods and nothing about ranks or devices.

cd examples && harness train --config own_task.yaml
cd examples && harness launch --strategy fsdp2 --num_processes 2 --config own_task.yaml
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness import StepOutput


class Sine:
    """Fit a sine with a small MLP.

    Args:
        width: hidden features.
        batch_size: samples in a batch of one process.
    """

    def __init__(self, width: int = 32, batch_size: int = 32) -> None:
        self.width = width
        self.batch_size = batch_size

    def model(self) -> nn.Module:
        """Make the model on the CPU."""
        return nn.Sequential(nn.Linear(1, self.width), nn.Tanh(), nn.Linear(self.width, 1))

    def train_data(self) -> DataLoader[Any]:
        """Make the training loader."""
        return DataLoader(_samples(1024, seed=0), batch_size=self.batch_size, shuffle=True)

    def eval_data(self) -> DataLoader[Any]:
        """Make the evaluation loader."""
        return DataLoader(_samples(256, seed=1), batch_size=self.batch_size)

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Compute the loss of one batch, in training as in evaluation."""
        x, y = batch
        loss = F.mse_loss(model(x), y)
        return StepOutput(loss, weight=len(x), metrics={"rmse": loss.detach().sqrt()})

    def input_example(self) -> Tensor:
        """Give the models in MLflow a signature."""
        return torch.zeros(2, 1)


def _samples(num: int, seed: int) -> TensorDataset:
    x = torch.rand(num, 1, generator=torch.Generator().manual_seed(seed)) * 6 - 3
    return TensorDataset(x, torch.sin(x))
