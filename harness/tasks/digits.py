"""Train a small convolutional network on scikit-learn's 1,797 images of handwritten digits, 8 x 8 pixels each.

Copy this example for your own task. A `harness.Task` has four methods, and this class adds the optional
`input_example`. The arguments of the constructor are the `init_args` in the YAML file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness.config.task import StepOutput

# Every fifth image is used for evaluation.
_EVAL_EVERY = 5


class Digits:
    """Classify handwritten digits.

    Args:
        width: channels of the first convolution.
        batch_size: images per batch and process.
        dropout: fraction of the features that is dropped in training.
    """

    def __init__(self, width: int = 16, batch_size: int = 16, dropout: float = 0.1) -> None:
        self.width = width
        self.batch_size = batch_size
        self.dropout = dropout

    def model(self) -> nn.Module:
        """Construct two convolutions with batch normalisation, and a linear layer."""
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
        """Return the loader of 1,437 images, shuffled."""
        return DataLoader(self._images(evaluation=False), self.batch_size, shuffle=True, drop_last=True)

    def eval_data(self) -> DataLoader[Any]:
        """Return the loader of the other 360 images."""
        return DataLoader(self._images(evaluation=True), 4 * self.batch_size)

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        """Compute the loss and the accuracy from images (B, 1, 8, 8), from 0 to 1, and labels (B,), from 0 to 9."""
        images, labels = batch
        logits = model(images)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return StepOutput(F.cross_entropy(logits.float(), labels), weight=len(labels), metrics={"accuracy": accuracy})

    def input_example(self) -> Tensor:
        """Return two images, from which MLflow infers the model's signature."""
        images: Tensor = self._images(evaluation=True).tensors[0]
        return images[:2]

    def _images(self, *, evaluation: bool) -> TensorDataset:
        rows = torch.from_numpy(np.loadtxt(_digits_file(), delimiter=","))
        images = rows[:, :-1].float().reshape(-1, 1, 8, 8) / 16.0
        labels = rows[:, -1].long()
        chosen = (torch.arange(len(labels)) % _EVAL_EVERY == 0) == evaluation
        return TensorDataset(images[chosen], labels[chosen])


def _digits_file() -> Path:
    """Return the file of `sklearn.datasets.load_digits` without importing sklearn, which takes longer than torch."""
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
