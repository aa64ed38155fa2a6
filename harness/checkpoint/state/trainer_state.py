"""Encode and read ``trainer_state.json``, the state of training besides tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.checkpoint.format.commit import TRAINER_STATE, Manifest
from harness.checkpoint.format.files import Files, LocalFiles
from harness.checkpoint.format.json_values import Get, decode, encode
from harness.checkpoint.state.kept_tensors import KeptTensors, content_of, require_savable, tensor_getter
from harness.checkpoint.state.kept_tensors import read as read_kept
from harness.checkpoint.state.optimizer_record import OptimizerRecord
from harness.errors import CheckpointError, DamagedError

FILE = TRAINER_STATE
_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Moment:
    """Describe the position of training at which a checkpoint is saved.

    Args:
        name: name of the directory, such as ``epoch-0005`` or ``step-00001200``.
        epoch: completed epochs.
        step: completed optimizer steps.
        batches_in_epoch: batches of the current loader that each rank has used in the current epoch.
        metrics: latest reduced metrics.
        samples_per_batch: samples over all ranks; None if unknown.
        accumulation: batches for an optimizer step.
        states: name -> `state_dict` of each registered object.
        loaders_done: completed training loaders of the current epoch.
        is_stopped: whether training has ended early and must not continue.
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
    """Hold a prepared model with its optimizer and scheduler: the only part, or one of the named parts of `Several`."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    scheduler: Any
    name: str = ""

    @property
    def parts(self) -> tuple[Watched, ...]:
        """Return a tuple of this part only, so that it can be used like `Several`."""
        return (self,)

    @property
    def prefix(self) -> str:
        """Return the prefix of its tensors' names in a checkpoint."""
        return f"{self.name}." if self.name else ""


@dataclass(frozen=True)
class Several:
    """Hold several models that are saved, restored and published together.

    Args:
        parts: parts with distinct names.
        counted: part whose optimizer steps are the run's steps; None if no part has an optimizer.
    """

    parts: tuple[Watched, ...]
    counted: Watched | None


AnyWatched = Watched | Several


def check_scheduler(watched: AnyWatched) -> None:
    """Check that every scheduler's state can be saved.

    Raises:
        CheckpointError: if a state has a value that `encode` refuses.
    """
    for part in watched.parts:
        try:
            encode(_scheduler_state(part))
        except TypeError as error:
            raise CheckpointError(
                f"the state of {type(part.scheduler).__name__} cannot be written as JSON ({error}); "
                "use checkpoint.save_weights_only, or a scheduler whose state_dict() is numbers and lists"
            ) from error


def _scheduler_state(part: Watched) -> Any:
    return None if part.scheduler is None else part.scheduler.state_dict()


def encode_state(name: str, state: Any, kept: KeptTensors | None) -> Any:
    """Encode the `state_dict` of a registered object as JSON values. `kept` stores its tensors; None only checks them.

    Effects: as `encode`; main thread, between steps.

    Raises:
        CheckpointError: if a value cannot be saved.
    """
    put = require_savable if kept is None else kept.put
    try:
        # Detach parameters (of an averaged copy of a module), which `put` refuses.
        return encode(state, lambda tensor: put(tensor.detach()))
    except Exception as error:
        # Values of any class may raise any error, and a state may contain itself.
        raise CheckpointError(
            f"register({name!r}): its state cannot be saved: {error}; make its state_dict() return numbers, text, "
            "tensors, and lists and dicts of these"
        ) from error


def capture_trainer_state(
    moment: Moment,
    watched: AnyWatched,
    groups: Mapping[str, Any],
    optimizers: Sequence[Mapping[str, Any]],
    scaler: Any,
    kept: KeptTensors,
) -> Any:
    """Encode the current state as JSON values, with the tensors of registered objects in `kept`.

    `groups` is the result of `groups_record`, and `optimizers` has the result of `record_of` for each part.

    Effects: not collective; main thread, between steps; synchronizes with CUDA if a state has CUDA tensors.

    Raises:
        CheckpointError: if the state of a registered object cannot be saved.
    """
    parts = [
        {
            "name": part.name,
            "optimizer": dict(optimizer),
            "scheduler": encode(_scheduler_state(part)),
            "loss_scale": encode(_loss_scale(part.model)),
        }
        for part, optimizer in zip(watched.parts, optimizers, strict=True)
    ]
    # A single model's values are stored at the top level.
    is_single = isinstance(watched, Watched)
    of_models = {"scheduler": parts[0]["scheduler"]} if is_single else {"parts": parts}
    of_scales = {"loss_scale": parts[0]["loss_scale"]} if is_single else {}
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
        "states": {name: encode_state(name, state, kept) for name, state in moment.states.items()},
        "optimizer": {**groups, **(optimizers[0] if is_single else {})},
        **of_models,
        "scaler": encode(None if scaler is None else scaler.state_dict()),
        **of_scales,
    }


def _loss_scale(model: Any) -> dict[str, float] | None:
    """Return the numbers in the dynamic loss scaler, a plain object, of a DeepSpeed fp16 engine; None for others."""
    scaler = getattr(getattr(model, "optimizer", None), "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {key: value for key, value in vars(scaler).items() if isinstance(value, (int, float))}


@dataclass(frozen=True)
class PartState:
    """Hold the state of one part (`Watched`) besides its tensors and its optimizer's groups.

    `loss_scale` has the numbers of DeepSpeed's loss scaler, or is None.
    """

    name: str
    scheduler: Any
    loss_scale: Mapping[str, float] | None
    optimizer: OptimizerRecord

    @classmethod
    def read(cls, record: Any, forms: Any, get: Get) -> PartState:
        """Decode the record of a part; `forms` are those of all parts' optimizers."""
        optimizer = OptimizerRecord.read({**record["optimizer"], "forms": forms}, get)
        return cls(record["name"], decode(record["scheduler"]), decode(record["loss_scale"]), optimizer)


@dataclass(frozen=True)
class TrainerState:
    """Hold the decoded content of ``trainer_state.json``; see `Moment` for the fields that are not listed here.

    Args:
        param_groups: hyperparameters of all optimizers' parameter groups; ``params`` are names.
        frozen: parameters in these groups whose requires_grad was False; None if not recorded.
        parts: state of each model.
        scaler: state of accelerate's gradient scaler, or None.
        states: name -> state of each registered object, as JSON values.
        registered: name -> the same state with its tensors, as `state_dict` returned it.
        ranks: `RankState.encoded` of each rank that saved.
    """

    epoch: int
    step: int
    loaders_done: int
    batches_in_epoch: int
    param_groups: Sequence[Mapping[str, Any]]
    frozen: frozenset[str] | None
    parts: Sequence[PartState]
    scaler: Any
    samples_per_batch: int | None
    accumulation: int
    metrics: Mapping[str, float]
    states: Mapping[str, Any]
    registered: Mapping[str, Any]
    is_stopped: bool
    ranks: Sequence[dict[str, Any]]


def read_trainer_state(
    checkpoint: Path, manifest: Manifest, files: Files | None = None, device: torch.device = _HOST
) -> TrainerState:
    """Read ``trainer_state.json`` of a checkpoint, and the tensors to which it refers. Digests are verified first.

    Effects: not collective; any thread; blocks on reading two files, by default from the local disk. Tensors that were
    on an accelerator are moved to `device`.

    Raises:
        DamagedError: if a file fails its check or is missing.
        CheckpointError: if the checkpoint holds weights only, or the disk fails.
    """
    path = checkpoint / FILE
    record = next((file for file in manifest.files if file.name == FILE), None)
    if record is None:
        raise CheckpointError(
            f"{checkpoint}: holds weights only (checkpoint.save_weights_only), so training cannot be resumed from it; "
            "use another checkpoint"
        )
    try:
        data = content_of(files or LocalFiles(checkpoint), record)
        return _parsed(json.loads(data), tensor_getter(read_kept(checkpoint, manifest, files), device))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedError(f"{path}: is damaged: {reason}; use another checkpoint") from error


def _parsed(record: Any, get: Get) -> TrainerState:
    position, optimizer = record["position"], record["optimizer"]
    parts = record.get("parts", [{**record, "name": ""}])
    found = TrainerState(
        epoch=record["epoch"],
        step=record["step"],
        loaders_done=position["loaders_done"],
        batches_in_epoch=position["batches"],
        param_groups=[dict(group) for group in decode(optimizer["param_groups"], get)],
        frozen=None if optimizer.get("frozen") is None else frozenset(optimizer["frozen"]),
        parts=[PartState.read(part, optimizer.get("forms", []), get) for part in parts],
        scaler=decode(record["scaler"]),
        samples_per_batch=position["samples_per_batch"],
        accumulation=position["accumulation"],
        metrics=dict(record["metrics"]),
        states=dict(record["states"]),
        registered=decode(record["states"], get),
        is_stopped=record["is_stopped"],
        ranks=[dict(rank) for rank in record["ranks"]],
    )
    counts = {
        "epoch": found.epoch,
        "step": found.step,
        "accumulation": found.accumulation,
        "loaders_done": found.loaders_done,
        "batches": found.batches_in_epoch,
        "samples_per_batch": found.samples_per_batch or 0,
    }
    for name, count in counts.items():
        if type(count) is not int or count < 0:
            raise ValueError(f"{name} is {count!r}, not a number of at least 0")
    if type(found.is_stopped) is not bool:
        raise ValueError(f"is_stopped is {found.is_stopped!r}, neither true nor false")
    return found
