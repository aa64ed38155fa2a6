"""What of a moment of training is not a tensor: ``trainer_state.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoint import strict_json
from harness.checkpoint.commit import TRAINER_STATE, Manifest
from harness.checkpoint.files import Files, LocalFiles
from harness.checkpoint.json_values import Get, decode, encode
from harness.checkpoint.kept_tensors import content_of, getting
from harness.checkpoint.kept_tensors import read as read_kept
from harness.checkpoint.optimizer_record import OptimizerRecord, put_back_optimizer
from harness.checkpoint.strict_json import is_count, is_number
from harness.errors import CheckpointError, DamagedError

FILE = TRAINER_STATE
_SHOWN = 3
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Moment:
    """Which moment of training a checkpoint is of.

    Args:
        name: of its directory: ``epoch-0005`` or ``step-00001200``.
        epoch: epochs that are complete.
        step: optimizer steps that are complete.
        batches_in_epoch: batches of the running epoch's loader that each rank has taken.
        metrics: the latest reduced metrics.
        samples_per_batch: of all ranks together; None: not known.
        accumulation: batches for an optimizer step.
        states: name -> state, as JSON values, of what else goes on where it was.
        loaders_done: training loaders of the running epoch that are done.
        is_stopped: whether the training has ended before its last epoch, for good.
    """

    name: str
    epoch: int
    step: int
    batches_in_epoch: int
    metrics: Mapping[str, float]
    samples_per_batch: int | None = None
    accumulation: int = 1
    states: Mapping[str, Any] = field(default_factory=dict)
    loaders_done: int = 0
    is_stopped: bool = False


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


def take_trainer_state(moment: Moment, watched: Watched, optimizer: Mapping[str, Any], scaler: Any) -> Any:
    """The state as it is now, as JSON values.

    Effects: not collective; main thread, between steps; a learning rate that is a tensor on CUDA is waited
    for; nothing on disk.

    Args:
        moment: counters and position.
        watched: for the scheduler.
        optimizer: what `record_of` gives.
        scaler: accelerate's gradient scaler, or None.
    """
    return {
        "epoch": moment.epoch,
        "step": moment.step,
        "position": {
            "loaders_done": moment.loaders_done,
            "batches": moment.batches_in_epoch,
            "samples_per_batch": moment.samples_per_batch,
            "accumulation": moment.accumulation,
        },
        "is_stopped": moment.is_stopped,
        "metrics": dict(moment.metrics),
        "states": dict(moment.states),
        "optimizer": dict(optimizer),
        "scheduler": encode(None if watched.scheduler is None else watched.scheduler.state_dict()),
        "scaler": encode(None if scaler is None else scaler.state_dict()),
        "loss_scale": encode(_loss_scale(watched.model)),
    }


def _loss_scale(model: Any) -> dict[str, float] | None:
    """Of a DeepSpeed engine in fp16: its scaler is a plain object with numbers."""
    scaler = getattr(getattr(model, "optimizer", None), "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))}


@dataclass(frozen=True)
class TrainerState:
    """What ``trainer_state.json`` of a checkpoint holds, as the objects that it was taken from have it.

    Args:
        epoch: epochs that were complete.
        step: optimizer steps that were complete.
        loaders_done: training loaders of the running epoch that were done.
        batches_in_epoch: batches of the next one that each rank had taken.
        param_groups: hyperparameters of each of the optimizer's parameter groups; ``params`` are names.
        scheduler: its state, or None.
        scaler: the state of accelerate's gradient scaler, or None.
        loss_scale: numbers of DeepSpeed's scaler, or None.
        samples_per_batch: of all ranks together, or None.
        accumulation: batches for an optimizer step.
        metrics: the latest reduced metrics.
        states: name -> state, as JSON values, of what else goes on.
        is_stopped: whether the training had ended before its last epoch, for good.
        ranks: of each rank that saved, as `RankState.encoded` made it.
        optimizer: what there is of the optimizer beside its groups and its tensors.
    """

    epoch: int
    step: int
    loaders_done: int
    batches_in_epoch: int
    param_groups: Sequence[Mapping[str, Any]]
    scheduler: Any
    scaler: Any
    loss_scale: Mapping[str, float] | None
    samples_per_batch: int | None
    accumulation: int
    metrics: Mapping[str, float]
    states: Mapping[str, Any]
    is_stopped: bool
    ranks: Sequence[dict[str, Any]]
    optimizer: OptimizerRecord = field(default_factory=OptimizerRecord)


def read_trainer_state(
    checkpoint: Path, manifest: Manifest, files: Files | None = None, device: torch.device = _HOST
) -> TrainerState:
    """Read ``trainer_state.json`` of a checkpoint, and the tensors that it refers to, against their digests.

    Effects: not collective; any thread; blocks for reading two files; nothing on disk.

    Args:
        checkpoint: its directory.
        manifest: the checkpoint's.
        files: where it is read from; None: this node's disk.
        device: where tensors are put that were on an accelerator.

    Raises:
        DamagedError: if it is not what was written.
        CheckpointError: if the checkpoint is of weights alone, or the disk does not give it.
    """
    path = checkpoint / FILE
    record = next((file for file in manifest.files if file.name == FILE), None)
    if record is None:
        raise CheckpointError(
            f"{checkpoint}: holds weights alone (checkpoint.save_weights_only), so training cannot go on from it; "
            "use another checkpoint"
        )
    try:
        data = content_of(files or LocalFiles(checkpoint), record)
        return _state(strict_json.parse(data), getting(read_kept(checkpoint, manifest, files), device))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged: {error}; use another checkpoint") from error


def _state(record: Any, get: Get) -> TrainerState:
    """The record as what it is, each value looked at.

    Raises:
        ValueError: if something is missing or of another type.
    """
    try:
        position, groups, scale = record["position"], record["optimizer"]["param_groups"], decode(record["loss_scale"])
        found = TrainerState(
            epoch=record["epoch"],
            step=record["step"],
            loaders_done=position["loaders_done"],
            batches_in_epoch=position["batches"],
            param_groups=decode(groups, get),
            scheduler=decode(record["scheduler"]),
            scaler=decode(record["scaler"]),
            loss_scale=scale,
            samples_per_batch=position["samples_per_batch"],
            accumulation=position["accumulation"],
            metrics=record["metrics"],
            states=record["states"],
            is_stopped=record["is_stopped"],
            ranks=record["ranks"],
            optimizer=OptimizerRecord.read(record["optimizer"], get),
        )
    except KeyError as error:
        raise ValueError(f"it has no {error}") from error
    except (TypeError, IndexError) as error:
        raise ValueError("it is of another structure") from error
    if not all(map(is_count, (found.epoch, found.step, found.loaders_done, found.batches_in_epoch))):
        raise ValueError("epochs, steps or batches are no whole numbers from 0 on")
    if not is_count(found.accumulation) or not (found.samples_per_batch is None or is_count(found.samples_per_batch)):
        raise ValueError("samples and accumulated batches are no whole numbers from 0 on")
    if not isinstance(found.is_stopped, bool):
        raise ValueError("is_stopped is neither true nor false")
    if not isinstance(found.states, dict) or not isinstance(found.metrics, dict):
        raise ValueError("states and metrics are no objects")
    if not all(map(is_number, found.metrics.values())):
        raise ValueError("metrics hold what is no number")
    for name, items in (("param_groups", found.param_groups), ("ranks", found.ranks)):
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError(f"{name} is no list of objects")
    if scale is not None and not (isinstance(scale, dict) and all(isinstance(n, (int, float)) for n in scale.values())):
        raise ValueError("loss_scale holds what is no number")
    return found


def require_same(
    state: TrainerState, watched: Watched, groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]]
) -> None:
    """Refuse, before anything is changed, a state that is of another optimizer or scheduler.

    Args:
        state: what the file holds.
        watched: for the scheduler.
        groups: the optimizer's live parameter groups, each with the names of its parameters.

    Raises:
        CheckpointError: if the parameter groups are others, or there was no such scheduler.
    """
    if len(state.param_groups) != len(groups):
        raise CheckpointError(
            f"the optimizer has {len(groups)} parameter groups, and had {len(state.param_groups)}; resume with the "
            "optimizer that was saved, or start another run"
        )
    for number, ((_, names), record) in enumerate(zip(groups, state.param_groups, strict=True)):
        now, before = set(names), set(record["params"])
        if now != before:
            others = [f"{_some(now - before)}, which it had not"] if now - before else []
            others += [f"no {_some(before - now)}, which it had"] if before - now else []
            raise CheckpointError(
                f"the optimizer's parameter group {number} has {', and '.join(others)}; resume with the model and the "
                "optimizer that were saved, or start another run"
            )
    if (watched.scheduler is None) != (state.scheduler is None):
        raise CheckpointError(
            f"the run had {'no' if state.scheduler is None else 'a'} scheduler; resume with what it had, or start "
            "another run"
        )


def _some(names: set[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(sorted(names)[:_SHOWN])}{more}"


def put_back(
    state: TrainerState,
    watched: Watched,
    groups: Sequence[tuple[Mapping[str, Any], Sequence[str]]],
    scaler: Any,
) -> None:
    """Put back what `take_trainer_state` took of the optimizer's groups, the scheduler and the scalers.

    Effects: not collective; main thread; nothing on disk.

    Args:
        state: what the file holds.
        watched: for the scheduler.
        groups: the optimizer's live parameter groups, each with the names of its parameters.
        scaler: accelerate's gradient scaler, or None.

    Raises:
        CheckpointError: as `require_same`.
    """
    require_same(state, watched, groups)
    for (live, _), record in zip(groups, state.param_groups, strict=True):
        assert isinstance(live, dict)
        for key, value in record.items():
            if key != "params":
                _put(live, key, value)
    put_back_optimizer(watched.optimizer, state.optimizer)
    if watched.scheduler is not None:
        watched.scheduler.load_state_dict(state.scheduler)
    if scaler is not None and state.scaler is not None:
        scaler.load_state_dict(state.scaler)
    loss_scaler = getattr(getattr(watched.model, "optimizer", None), "loss_scaler", None)
    for key, value in (state.loss_scale or {}).items():
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
