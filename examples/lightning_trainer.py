"""`lightning.pytorch.Trainer` with the harness callback.

pip install 'harness[lightning]'
python examples/lightning_trainer.py
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional as F

from harness.integrations.lightning import HarnessCallback
from harness.tasks import Digits


class Classifier(pl.LightningModule):
    """A small convolutional net on handwritten digits."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Digits(width=width).model()

    def training_step(self, batch: Any, _index: int) -> Tensor:
        """Compute the loss of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        """Log the accuracy."""
        images, labels = batch
        accuracy = (self.net(images).argmax(-1) == labels).float().mean()
        self.log("eval/accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--run_name", default="lightning-trainer")
options = parser.parse_args()

pl.seed_everything(0, verbose=False)
task = Digits(batch_size=32)
trainer = pl.Trainer(
    max_epochs=options.epochs,
    accelerator="auto",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    log_every_n_steps=10,
    callbacks=[HarnessCallback(every_n_epochs=2, experiment_name="examples", run_name=options.run_name)],
)
trainer.fit(Classifier(), task.train_data(), task.eval_data())
