"""Parameter groups that come, go and change places, and parameters that are frozen for a while: a resume is exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.errors import CheckpointError

State = dict[str, Tensor]
HEAD, BODY = 1, 0


class Crash(Exception):
    pass


def add_group(model: Any, optimizer: Any, epoch: int) -> None:
    """The body is unfrozen in the second epoch, or the first after it, and gets a group of its own."""
    if epoch >= 1 and not model[BODY].weight.requires_grad:
        model[BODY].requires_grad_(True)
        optimizer.optimizer.add_param_group({"params": model[BODY].parameters(), "lr": 0.01})


def unfreeze(model: Any, optimizer: Any, epoch: int) -> None:
    """The body is unfrozen, and was in the optimizer from the start."""
    model[BODY].requires_grad_(epoch >= 1)


def add_group_once(model: Any, optimizer: Any, epoch: int) -> None:
    """A loop that resumes behind this epoch does not come here again."""
    if epoch == 1:
        add_group(model, optimizer, epoch)


def train(
    run_dir: Path,
    run_name: str,
    begins_epoch: Callable[[Any, Any, int], None],
    *,
    groups: tuple[tuple[int, ...], ...] = ((HEAD,),),
    is_frozen: bool = True,
    scheduled: bool = False,
    crash_at: int | None = None,
) -> tuple[State, Any]:
    """Four epochs of two steps, and a checkpoint at each step; the weights at the end, and the optimizer."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[BODY].requires_grad_(not is_frozen)
    made = [
        {"params": [each for part in group for each in model[part].parameters()], "lr": 0.1 / (1 + group[0])}
        for group in groups
    ]
    optimizer: Any = torch.optim.AdamW(made)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if scheduled else None
    loader: Any
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(torch.randn(8, 4), batch_size=4))
    try:
        with PeriodicLogger(
            accelerator,
            1,
            run_name=run_name,
            run_dir=run_dir,
            checkpoint=CheckpointConfig(every_n_steps=1, when_busy="wait"),
            tracking=TrackingConfig(enabled=False),
        ) as logger:
            logger.watch(model, optimizer, scheduler)
            for epoch in logger.epochs(4):
                begins_epoch(model, optimizer, epoch)
                for batch in logger.batches(loader):
                    if logger.step == crash_at:
                        raise Crash
                    accelerator.backward(model(batch).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                    if scheduler is not None:
                        for group in optimizer.param_groups:  # as schedulers do that know of groups that come later
                            group["lr"] *= 0.9
    except Crash:
        pass
    return {name: value.clone() for name, value in model.state_dict().items()}, optimizer.optimizer


def same(a: State, b: State) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def nothing(model: Any, optimizer: Any, epoch: int) -> None:
    pass


@pytest.mark.parametrize("crash_at", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    ("begins_epoch", "groups"), [(add_group, ((HEAD,),)), (unfreeze, ((HEAD, BODY),)), (unfreeze, ((HEAD,), (BODY,)))]
)
def test_weights_are_the_same_when_resumed_before_or_after_unfreezing(
    tmp_path: Path, begins_epoch: Any, groups: Any, crash_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, optimizer = train(tmp_path, "whole", begins_epoch, groups=groups)
    train(tmp_path, "cut", begins_epoch, groups=groups, crash_at=crash_at)
    resumed, again = train(tmp_path, "cut", begins_epoch, groups=groups)
    assert same(resumed, whole)
    rates = [[group["lr"] for group in each.param_groups] for each in (again, optimizer)]
    assert rates[0] == rates[1]
    assert "requires_grad is False" not in capsys.readouterr().err
    assert "add_param_group" not in vars(again)


def test_group_is_there_and_a_line_is_said_when_the_loop_does_not_unfreeze_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "cut", add_group_once, crash_at=5)
    _, optimizer = train(tmp_path, "cut", add_group_once)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    assert "0.weight, 0.bias: requires_grad is False, and was True at the checkpoint" in capsys.readouterr().err


def test_error_when_the_loop_adds_another_group_than_the_checkpoint_has(tmp_path: Path) -> None:
    def add_another(model: Any, optimizer: Any, epoch: int) -> None:
        optimizer.optimizer.add_param_group({"params": [model[BODY].weight]})

    train(tmp_path, "cut", add_group, crash_at=5)
    with pytest.raises(CheckpointError, match="some of which are in another group of the checkpoint"):
        train(tmp_path, "cut", add_another)


def test_weights_are_the_same_when_groups_have_changed_places(tmp_path: Path) -> None:
    both = {"is_frozen": False}
    whole, _ = train(tmp_path, "whole", nothing, groups=((HEAD,), (BODY,)), **both)
    train(tmp_path, "cut", nothing, groups=((HEAD,), (BODY,)), crash_at=3, **both)
    resumed, optimizer = train(tmp_path, "cut", nothing, groups=((BODY,), (HEAD,)), **both)
    assert same(resumed, whole)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]


def test_new_group_starts_as_it_was_made_when_the_checkpoint_has_none_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "cut", nothing, crash_at=3)
    _, optimizer = train(tmp_path, "cut", nothing, groups=((BODY,), (HEAD,)), is_frozen=False)
    assert "parameter group 0 is not in the checkpoint: it keeps its initial values" in capsys.readouterr().err
    steps = [optimizer.state[group["params"][0]]["step"].item() for group in optimizer.param_groups]
    assert steps == [5, 8]


@pytest.mark.parametrize(
    ("groups", "scheduled", "message"),
    [
        (((BODY, HEAD),), False, "parameter group 0 has 0.bias, 0.weight, which it had not"),
        (((BODY,), (HEAD,)), True, "the scheduler's state is by their numbers"),
        (((HEAD,), (BODY,)), True, "the scheduler's state is by their numbers"),
    ],
)
def test_error_when_groups_cannot_be_told_apart(tmp_path: Path, groups: Any, scheduled: bool, message: str) -> None:
    train(tmp_path, "cut", nothing, crash_at=3, scheduled=scheduled)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, "cut", nothing, groups=groups, scheduled=scheduled)
