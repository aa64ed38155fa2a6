"""A rank of test_metrics.py: evaluates and logs on uneven shards, writes what all ranks got."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torchmetrics
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness import PeriodicLogger, TrackingConfig
from harness.config.schema import TrainerConfig
from harness.distributed.strategies import start

NUM_SAMPLES = (37, 4, 50, 7)


def evaluate(accelerator: Accelerator, logger: PeriodicLogger, num_samples: int, batch_size: int) -> None:
    generator = torch.Generator().manual_seed(num_samples)
    inputs, targets = (
        torch.randn(num_samples, 3, generator=generator),
        torch.randint(0, 2, (num_samples,), generator=generator),
    )
    loader = accelerator.prepare(DataLoader(TensorDataset(inputs, targets), batch_size))
    objects = {
        f"eval/f1_{num_samples}": torchmetrics.F1Score("multiclass", num_classes=2, average="macro"),
        # Keeps every prediction in a list: a rank that has none must not make the others wait.
        f"eval/auroc_{num_samples}": torchmetrics.AUROC("binary"),
    }
    seen = 0
    for batch_inputs, batch_targets in logger.eval_batches(loader):
        scores = batch_inputs.sum(-1).sigmoid()
        correct = ((scores > 0.5).long() == batch_targets).float()
        logger.log(
            {f"eval/accuracy_{num_samples}": correct.mean(), f"eval/score_{num_samples}": scores.mean()}, len(correct)
        )
        logger.update(
            {f"eval/f1_{num_samples}": objects[f"eval/f1_{num_samples}"]}, (scores > 0.5).long(), batch_targets
        )
        logger.update({f"eval/auroc_{num_samples}": objects[f"eval/auroc_{num_samples}"]}, scores, batch_targets)
        seen += len(batch_targets)


def train(accelerator: Accelerator, logger: PeriodicLogger) -> None:
    """Ranks log different names, different numbers of times, with different weights."""
    rank, world_size = accelerator.process_index, accelerator.num_processes
    model, loader = accelerator.prepare(
        nn.Linear(1, 1), DataLoader(TensorDataset(torch.zeros(24, 1)), 24 // world_size)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    logger.watch(model, optimizer)
    for _ in logger.epochs(3):
        for _ in logger.batches(loader):
            # Twelve values with weights 1 to 12, dealt out unevenly: all to one process, or by turns.
            for value in range(1, 13):
                if value * value % world_size == rank:
                    logger.log({"train/ragged": torch.tensor(value / 7.0)}, weight=value)
            if rank == world_size - 1:
                logger.log({"train/last_rank_only": 2.5}, weight=3)
            if logger.epoch == 1 and rank == 0:
                logger.log({"train/first_rank_and_late": torch.tensor(1.5)})


def main() -> None:
    accelerator = start(TrainerConfig(), seed=0)
    with PeriodicLogger(
        accelerator, every_n_epochs=None, run_name="it", tracking=TrackingConfig(enabled=False, log_every_n_steps=1)
    ) as logger:
        for num_samples in NUM_SAMPLES:
            for batch_size in (3, 16):
                evaluate(accelerator, logger, num_samples, batch_size)
        train(accelerator, logger)
        values = {name: value for name, value in logger.latest.items() if not name.startswith("perf/")}
    Path(sys.argv[1], f"rank{accelerator.process_index}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main()
