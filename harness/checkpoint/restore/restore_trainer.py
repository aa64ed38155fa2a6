"""Restore what of a checkpoint is not a tensor: hyperparameters, schedulers, scalers, state of no parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch

from harness.checkpoint.state.optimizer_record import restore_optimizer_extras
from harness.checkpoint.state.param_groups import match_groups, require_groups
from harness.checkpoint.state.trainer_state import AnyWatched, PartState, TrainerState, Watched
from harness.errors import CheckpointError


def require_same(
    state: TrainerState, watched: AnyWatched, groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]]
) -> None:
    """Refuse, before anything is changed, a state that is of another optimizer or scheduler.

    Args:
        state: what the file holds.
        watched: for the names of the parts and the schedulers.
        groups: the optimizers' live parameter groups, each with the names of its parameters.

    Raises:
        CheckpointError: if the parts or their parameter groups are others, or there was no such scheduler.
    """
    if (now := [part.name for part in watched.parts]) != (before := [part.name for part in state.parts]):
        raise CheckpointError(
            f"the checkpoint is of {_described(before)}, and watch() was given {_described(now)}; give it the same "
            "models under the same names, in the same order, or start another run"
        )
    has_scheduler = any(part.scheduler is not None for part in watched.parts)
    require_groups(state.param_groups, groups, has_scheduler=has_scheduler)
    for part, saved in zip(watched.parts, state.parts, strict=True):
        if (part.scheduler is None) != (saved.scheduler is None):
            where = f" of {part.name!r}" if part.name else ""
            raise CheckpointError(
                f"the run had {'no' if saved.scheduler is None else 'a'} scheduler{where}; resume with what it had, or "
                "start another run"
            )


def _described(names: Sequence[str]) -> str:
    return "one model without a name" if list(names) == [""] else f"the models {', '.join(map(repr, names))}"


def put_back(
    state: TrainerState,
    watched: AnyWatched,
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    scaler: Any,
) -> None:
    """Put back what `capture_trainer_state` took of the optimizers' groups, the schedulers and the scalers.

    Effects: not collective; main thread; nothing on disk.

    Args:
        state: what the file holds.
        watched: for the schedulers and DeepSpeed's loss scales.
        groups: the optimizers' live parameter groups, each with the names of its parameters; those that the checkpoint
            has not stay as they are.
        scaler: accelerate's gradient scaler, or None.
    """
    for (live, _), number in zip(groups, match_groups(state.param_groups, groups), strict=True):
        assert isinstance(live, dict)
        for key, value in state.param_groups[number].items() if number is not None else ():
            if key != "params":
                _put(live, key, value)
    if scaler is not None and state.scaler is not None:
        scaler.load_state_dict(state.scaler)
    for part, saved in zip(watched.parts, state.parts, strict=True):
        _restore_part(part, saved)


def _restore_part(part: Watched, saved: PartState) -> None:
    restore_optimizer_extras(part.optimizer, saved.optimizer)
    if part.scheduler is not None:
        part.scheduler.load_state_dict(saved.scheduler)
    loss_scaler = getattr(getattr(part.model, "optimizer", None), "loss_scaler", None)
    for key, value in (saved.loss_scale or {}).items():
        if loss_scaler is not None and hasattr(loss_scaler, key):
            setattr(loss_scaler, key, value)


def _put(group: dict[str, Any], key: str, value: Any) -> None:
    """In place where it is a tensor: a captured or compiled step reads that one."""
    live = group.get(key)
    if isinstance(live, torch.Tensor) and live.numel() == torch.as_tensor(value).numel():
        live.copy_(torch.as_tensor(value).reshape(live.shape))
    elif isinstance(live, Enum):
        group[key] = type(live)(value)  # of which JSON has the value alone
    else:
        group[key] = value.item() if isinstance(value, torch.Tensor) and isinstance(live, (int, float)) else value
