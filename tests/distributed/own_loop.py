"""Somebody's own Accelerate loop, with the periodic logger in it: the contract's example, on real data."""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from harness import PeriodicLogger, TrackingConfig
from harness.tasks import Digits

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
task = Digits(batch_size=32)
model = task.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, task.train_data(), task.eval_data())
tracking = TrackingConfig(log_every_n_steps=5, tags={"team": "vision"})
with PeriodicLogger(
    accelerator, every_n_epochs=2, experiment_name="own", run_name=sys.argv[1], tracking=tracking, params={"lr": 2e-3}
) as logger:
    logger.watch(model, optimizer)
    for _epoch in logger.epochs(4):
        model.train()
        for images, labels in logger.batches(loader):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            logger.log({"train/loss": loss}, weight=len(labels))
        model.eval()
        with torch.no_grad():
            for images, labels in logger.eval_batches(eval_loader):
                correct = (model(images).argmax(-1) == labels).float().mean()
                logger.log({"eval/accuracy": correct}, weight=len(labels))
assert isinstance(model, nn.Module)
