"""Handwritten digits: a small convolutional net on scikit-learn's 1,797 real images of 8 x 8 pixels."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness.task import StepOutput

_EVAL_EVERY = 5  # each fifth image is for evaluation


class Digits:
    """Tell digits apart.

    Args:
        width: channels of the first convolution.
        batch_size: images in a batch of one process.
        dropout: share of the features that are dropped in training.
    """

    def __init__(self, width: int = 16, batch_size: int = 16, dropout: float = 0.1) -> None:
        self.width = width
        self.batch_size = batch_size
        self.dropout = dropout

    def model(self) -> nn.Module:
        """Two convolutions with batch normalisation, and a linear layer."""
        return nn.Sequential(
            nn.Conv2d(1, self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.width),
            nn.ReLU(),
            nn.Conv2d(self.width, 2 * self.width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * self.width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(2 * self.width * 16, 10),
        )

    def train_data(self) -> DataLoader[Any]:
        """1,437 images, shuffled."""
        return DataLoader(self._images(evaluation=False), self.batch_size, shuffle=True, drop_last=True)

    def eval_data(self) -> DataLoader[Any]:
        """360 images."""
        return DataLoader(self._images(evaluation=True), 4 * self.batch_size)

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        """Cross entropy and accuracy of one batch."""
        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return StepOutput(F.cross_entropy(logits.float(), labels), weight=len(labels), metrics={"accuracy": accuracy})

    def input_example(self) -> Tensor:
        """Two images, for the signature of the models in MLflow."""
        images: Tensor = self._images(evaluation=True).tensors[0]
        return images[:2]

    def _images(self, *, evaluation: bool) -> TensorDataset:
        data = load_digits()
        chosen = (torch.arange(len(data.target)) % _EVAL_EVERY == 0) == evaluation
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
        return TensorDataset(images[chosen], torch.tensor(data.target)[chosen])
