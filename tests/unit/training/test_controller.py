"""What a `PeriodicLogger` makes of what happens in a loop, its own or somebody else's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.commit import list_checkpoints


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


def test_values_of_each_complete_step_are_told_when_the_loop_fails(accelerator: Accelerator, tmp_path: Path) -> None:
    told: dict[int, float] = {}

    def take(values: Mapping[str, float], step: int) -> None:
        told[step] = values["loss"]
        if step == 3:
            raise KeyError("in a callback, while the run ends")

    tracking = TrackingConfig(enabled=False, log_every_n_steps=1)
    with (
        pytest.raises(ValueError, match="the loop's own"),
        PeriodicLogger(accelerator, None, run_name="it", run_dir=tmp_path, tracking=tracking) as logger,
    ):
        logger.on_reduced(take)
        for _ in logger.epochs(1):
            for number in logger.batches(range(8)):
                if number == 3:
                    raise ValueError("the loop's own")
                logger.log({"loss": float(number)})
    assert told == {1: 0.0, 2: 1.0, 3: 2.0}
