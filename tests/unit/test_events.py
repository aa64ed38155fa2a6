"""A loop of somebody else's that tells a `PeriodicLogger` what happens in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.commit import list_checkpoints


def test_each_multiple_has_its_window_and_checkpoint_when_steps_jump(accelerator: Accelerator, tmp_path: Path) -> None:
    model: Any = nn.Linear(1, 1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    windows: dict[int, float] = {}
    with PeriodicLogger(
        accelerator,
        every_n_epochs=None,
        run_name="it",
        run_dir=tmp_path,
        checkpoint=CheckpointConfig(every_n_steps=10, when_busy="wait", save_last=False),
        tracking=TrackingConfig(enabled=False, log_every_n_steps=5),
    ) as logger:
        logger.watch(model, optimizer)
        logger.on_reduced(lambda values, step: windows.update({step: values["loss"]} if "loss" in values else {}))
        logger.events.begin_epoch()
        for step in range(3, 31, 3):  # as many optimizers step in turn
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            logger.log({"loss": float(step)})
            logger.events.batch_done(1, is_loaders_last=False, step=step)
        logger.events.end_epoch(is_whole=False)
    names = [name for name, _ in list_checkpoints(tmp_path / "it" / "checkpoints")]
    assert names == ["step-00000012", "step-00000021", "step-00000030"]
    assert windows == {6: 4.5, 12: 10.5, 15: 15.0, 21: 19.5, 27: 25.5, 30: 30.0}
