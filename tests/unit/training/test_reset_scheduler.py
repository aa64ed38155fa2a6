"""A run that is resumed with another schedule: what the learning rate will do is said, and the new one can be had."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.errors import CheckpointError

STEPS = 4


def cosine(optimizer: Any, num_epochs: int) -> Any:
    return CosineAnnealingLR(optimizer, T_max=STEPS * num_epochs)


def warm_up(optimizer: Any, num_epochs: int) -> Any:
    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1, total_iters=3), cosine(optimizer, num_epochs)], [3])


def one_cycle(optimizer: Any, num_epochs: int) -> Any:
    return OneCycleLR(optimizer, 0.1, total_steps=STEPS * num_epochs)


def function(optimizer: Any, num_epochs: int) -> Any:
    return LambdaLR(optimizer, lambda step: 1 - step / (STEPS * num_epochs))


def plateau(optimizer: Any, num_epochs: int) -> Any:
    return ReduceLROnPlateau(optimizer, patience=num_epochs)


def train(
    run_dir: Path,
    run_name: str,
    make: Callable[[Any, int], Any],
    num_epochs: int,
    *,
    of: int | None = None,
    reset: bool = False,
) -> list[float]:
    """The learning rate at each step; `of`: epochs by which the schedule is made."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    scheduler = make(optimizer, num_epochs if of is None else of)
    model, prepared, loader = accelerator.prepare(model, optimizer, DataLoader(torch.ones(2 * STEPS, 3), batch_size=2))
    rates = []
    with PeriodicLogger(
        accelerator,
        1,
        run_name=run_name,
        run_dir=run_dir,
        checkpoint=CheckpointConfig(when_busy="wait"),
        tracking=TrackingConfig(enabled=False),
        reset_scheduler=reset,
    ) as logger:
        logger.watch(model, prepared, scheduler)
        for _ in logger.epochs(num_epochs):
            for batch in logger.batches(loader):
                accelerator.backward(model(batch).mean())
                prepared.step()
                prepared.zero_grad()
                rates.append(optimizer.param_groups[0]["lr"])
                scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    return rates


@pytest.mark.parametrize("make", [cosine, warm_up, one_cycle, function])
def test_schedule_is_that_of_a_run_made_so_from_the_start_when_it_is_reset(
    tmp_path: Path, make: Callable[[Any, int], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path, "whole", make, 4)
    train(tmp_path, "cut", make, 2)
    assert train(tmp_path, "cut", make, 4, reset=True) == whole[2 * STEPS :]
    assert "is reset: after 8 of its steps the learning rate is" in capsys.readouterr().err


def test_line_has_what_the_learning_rate_will_do_when_a_value_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "cut", cosine, 2)
    rates = train(tmp_path, "cut", cosine, 4)
    said = capsys.readouterr().err
    assert "T_max=16 (8)" in said
    assert (
        "in its next 8 steps the learning rate changes from 0 to 0.1, and with the new arguments it would change"
        in said
    )
    assert "from 0.05 to 0: set reset_scheduler (--reset_scheduler) to use the new ones" in said
    assert rates[0] == pytest.approx(0, abs=1e-9)
    assert rates == sorted(rates)


@pytest.mark.parametrize("make", [cosine, warm_up, one_cycle, function, plateau])
def test_nothing_is_said_and_rates_are_the_same_when_nothing_has_changed(
    tmp_path: Path, make: Callable[[Any, int], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path, "whole", make, 4)
    train(tmp_path, "cut", make, 2, of=4)
    assert train(tmp_path, "cut", make, 4) == whole[2 * STEPS :]
    assert "learning rate" not in capsys.readouterr().err


def test_line_is_said_when_the_schedule_is_another_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "cut", function, 2)
    train(tmp_path, "cut", function, 4)
    assert re.search(r"another function .* was 0, and by the function it is 0\.05 there", capsys.readouterr().err)


def test_error_when_the_new_schedule_ends_before_the_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, "cut", one_cycle, 2)
    with pytest.raises(CheckpointError, match="OneCycleLR as it is made now cannot be stepped 8 times"):
        train(tmp_path, "cut", one_cycle, 3, of=1, reset=True)
