"""A plain PyTorch loop, in one process, with `PeriodicLogger`: nothing is prepared, `loss.backward()` stays.

    python examples/plain_pytorch.py

`harness run` and `harness.autolog` see Accelerate scripts only, so this loop names what it saves. The
`Accelerator` only describes the process; it moves and wraps nothing.
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
parser.add_argument("--run_name", default="plain-pytorch")
options = parser.parse_args()

accelerator = Accelerator()
device = accelerator.device
torch.manual_seed(0)
task = Digits(batch_size=32)
model = task.model().to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
loader = task.train_data()

with PeriodicLogger(accelerator, every_n_epochs=2, experiment_name="examples", run_name=options.run_name) as logger:
    logger.watch(model, optimizer, scheduler)
    for _epoch in logger.epochs(options.epochs):
        for images, labels in logger.batches(loader):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logger.log({"train/loss": loss}, weight=len(labels))
        scheduler.step()
