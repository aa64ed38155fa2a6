"""An Accelerate loop of your own with `PeriodicLogger`: metrics, checkpoints and the MLflow run in seven lines.

    python examples/own_loop.py
    accelerate launch --num_processes 2 examples/own_loop.py --epochs 20

Run it again with the same `--run_name` after an interruption: it resumes from the newest checkpoint.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from harness import PeriodicLogger
from harness.tasks import Digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--lr", type=float, default=2e-3)
parser.add_argument("--run_name", default="own-loop")
options = parser.parse_args()

accelerator = Accelerator()
torch.manual_seed(0)
task = Digits(batch_size=32)
model = task.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
model, optimizer, loader, eval_loader = accelerator.prepare(model, optimizer, task.train_data(), task.eval_data())

with PeriodicLogger(
    accelerator, every_n_epochs=2, experiment_name="examples", run_name=options.run_name, params=vars(options)
) as logger:
    logger.watch(model, optimizer)
    for _epoch in logger.epochs(options.epochs):
        model.train()
        for images, labels in logger.batches(loader):
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            logger.log({"train/loss": loss}, weight=len(labels))
        model.eval()
        with torch.no_grad():
            for images, labels in logger.eval_batches(eval_loader):
                accuracy = (model(images).argmax(-1) == labels).float().mean()
                logger.log({"eval/accuracy": accuracy}, weight=len(labels))
