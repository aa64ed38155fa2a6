"""What of a moment of training is not a tensor: ``trainer_state.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.checkpoint.json_values import encode
from harness.errors import CheckpointError

FILE = "trainer_state.json"


@dataclass(frozen=True)
class Moment:
    """Which moment of training a checkpoint is of.

    Args:
        name: of its directory: ``epoch-0005`` or ``step-00001200``.
        epoch: epochs that are complete.
        step: optimizer steps that are complete.
        batches_in_epoch: batches of the running epoch that each rank has taken.
        metrics: the latest reduced metrics.
    """

    name: str
    epoch: int
    step: int
    batches_in_epoch: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Watched:
    """What a checkpoint is of: the prepared objects."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any


def check_scheduler(watched: Watched) -> None:
    """Refuse a scheduler that could not be saved.

    Raises:
        CheckpointError: if its state is not numbers, text and lists of these.
    """
    try:
        encode(None if watched.scheduler is None else watched.scheduler.state_dict())
    except TypeError as error:
        raise CheckpointError(
            f"the state of {type(watched.scheduler).__name__} cannot be written as JSON ({error}); "
            "use checkpoint.save_weights_only, or a scheduler whose state_dict() is numbers and lists"
        ) from error


def take_trainer_state(moment: Moment, watched: Watched, groups: Sequence[Mapping[str, Any]], scaler: Any) -> Any:
    """The state as it is now, as JSON values.

    Effects: not collective; main thread, between steps; a learning rate that is a tensor on CUDA is waited
    for; nothing on disk.

    Args:
        moment: counters and position.
        watched: for the scheduler.
        groups: hyperparameters of each of the optimizer's parameter groups, as JSON values.
        scaler: accelerate's gradient scaler, or None.
    """
    return {
        "epoch": moment.epoch,
        "step": moment.step,
        "position": {"epoch": moment.epoch, "batches": moment.batches_in_epoch},
        "optimizer": {"param_groups": list(groups)},
        "scheduler": encode(None if watched.scheduler is None else watched.scheduler.state_dict()),
        "scaler": encode(None if scaler is None else scaler.state_dict()),
        "loss_scale": _loss_scale(watched.model),
    }


def _loss_scale(model: Any) -> dict[str, float] | None:
    """Of a DeepSpeed engine in fp16: its scaler is a plain object with numbers."""
    scaler = getattr(getattr(model, "optimizer", None), "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))}
