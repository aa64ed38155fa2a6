"""A `LightningModule` on real images, importable by what loads it again."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from harness.tasks import Digits

NUM_IMAGES = 250  # 7 batches of 32, and one of 26


class DigitsModule(pl.LightningModule):
    def __init__(self, width: int = 4, fails_at: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Digits(width=width, dropout=0.0).model()
        self.fails_at = fails_at

    def forward(self, images: Tensor) -> Any:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the disk of this data set fell out")
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("eval/loss", F.cross_entropy(self(images), labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Subset(Digits()._images(evaluation=False), range(NUM_IMAGES)), 32, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Digits()._images(evaluation=True), 180)


class ShardedDigits(DigitsModule):
    """The same, sharded by FSDP2 under `ModelParallelStrategy`. Without buffers that FSDP2 leaves to each rank."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
