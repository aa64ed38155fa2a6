"""What of a moment of training is not a tensor: ``trainer_state.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.checkpoint.json_values import decode, encode
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
        samples_per_batch: of all ranks together; None: not known.
        accumulation: batches for an optimizer step.
        states: name -> state, as JSON values, of what else goes on where it was.
    """

    name: str
    epoch: int
    step: int
    batches_in_epoch: int
    metrics: Mapping[str, float]
    samples_per_batch: int | None = None
    accumulation: int = 1
    states: Mapping[str, Any] = field(default_factory=dict)


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
        "position": {
            "epoch": moment.epoch,
            "batches": moment.batches_in_epoch,
            "samples_per_batch": moment.samples_per_batch,
            "accumulation": moment.accumulation,
        },
        "metrics": dict(moment.metrics),
        "states": dict(moment.states),
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


def put_back(
    state: Mapping[str, Any],
    watched: Watched,
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    scaler: Any,
) -> None:
    """Put back what `take_trainer_state` took: hyperparameters, scheduler, loss scale.

    Effects: not collective; main thread; nothing on disk.

    Args:
        state: what the file holds.
        watched: for the scheduler.
        groups: the optimizer's live parameter groups, each with the names of its parameters.
        scaler: accelerate's gradient scaler, or None.

    Raises:
        CheckpointError: if the parameter groups are others, or there was no such scheduler.
    """
    saved = state["optimizer"]["param_groups"]
    if len(saved) != len(groups):
        raise CheckpointError(
            f"the optimizer has {len(groups)} parameter groups, and had {len(saved)}; resume with the optimizer that "
            "was saved, or start another run"
        )
    for number, ((live, names), record) in enumerate(zip(groups, saved, strict=True)):
        if sorted(names) != sorted(record["params"]):
            raise CheckpointError(
                f"the optimizer's parameter group {number} has other parameters than it had; resume with the optimizer "
                "that was saved, or start another run"
            )
        assert isinstance(live, dict)
        for key, value in record.items():
            if key != "params":
                _put(live, key, decode(value))
    if (watched.scheduler is None) != (state["scheduler"] is None):
        raise CheckpointError(
            f"the run had {'no' if state['scheduler'] is None else 'a'} scheduler; resume with what it had, or start "
            "another run"
        )
    if watched.scheduler is not None:
        watched.scheduler.load_state_dict(decode(state["scheduler"]))
    if scaler is not None and state["scaler"] is not None:
        scaler.load_state_dict(decode(state["scaler"]))
    loss_scaler = getattr(getattr(watched.model, "optimizer", None), "loss_scaler", None)
    for key, value in (state["loss_scale"] or {}).items():
        if loss_scaler is not None and hasattr(loss_scaler, key):
            setattr(loss_scaler, key, value)


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    """In place where it is a tensor: a captured or compiled step reads that one."""
    live = group.get(key)
    if isinstance(live, torch.Tensor):
        live.copy_(torch.as_tensor(value))
    else:
        group[key] = value.item() if isinstance(value, torch.Tensor) and isinstance(live, (int, float)) else value
