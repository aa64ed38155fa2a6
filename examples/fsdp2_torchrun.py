"""An Accelerate script with FSDP2 under torchrun, without a line about harness.

    torchrun --nproc_per_node 2 --no-python harness run --every_n_epochs 2 examples/fsdp2_torchrun.py

`harness run` logs the loss over all ranks and saves each second epoch: one `model.safetensors` with the
full shapes, of which each rank has written its own rows.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.nn import functional as F

from harness.tasks import Digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
options = parser.parse_args()

accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap"))
torch.manual_seed(0)
task = Digits(batch_size=32)
model = task.model()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, task.train_data())

for epoch in range(options.epochs):
    for images, labels in loader:
        loss = F.cross_entropy(model(images), labels)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}")
accelerator.end_training()
