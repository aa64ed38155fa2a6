"""The `LightningModule` of `lightning_fit`, in a module that unpickling can import."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from benchmarks.peers import task

# The two packages have the same in them. MLflow documents its autologging for `pytorch_lightning`.
PACKAGE = os.environ.get("COMPARE_LIGHTNING", "lightning.pytorch")
pl: Any = importlib.import_module(PACKAGE)
EVERY_STEP = {"on_step": True, "on_epoch": True}


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, num_steps: int, is_sharded: bool) -> None:
        super().__init__()
        self.net = task.Net()
        self.num_steps = num_steps
        self.is_sharded = is_sharded

    def configure_model(self) -> None:
        if self.is_sharded:
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net.first, self.net.last, self):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.net(**batch)["loss"]
        size = len(batch["labels"])
        self.log("loss", loss, batch_size=size, **EVERY_STEP)
        self.log("loss_sync", loss, batch_size=size, sync_dist=True, **EVERY_STEP)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)

    def train_dataloader(self) -> Any:
        return task.loader(self.num_steps, self.trainer.world_size, self.trainer.global_rank)
