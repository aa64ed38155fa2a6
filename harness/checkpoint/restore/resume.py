"""Resume a run: restore the newest intact checkpoint into model, optimizer, scheduler and trainer.

    for each checkpoint, the newest first:  open -> read trainer_state.json -> tensors -> groups, schedulers, scalers

A damaged checkpoint is skipped; any other failure ends the run, because it would recur or pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from harness.checkpoint.format.commit import read_manifest, set_aside
from harness.checkpoint.restore.locate import FoundCheckpoints
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.restore import restore_tensors
from harness.checkpoint.restore.visibility import open_checkpoint
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.optimizer_record import has_unrecorded, restore_optimizer_extras
from harness.checkpoint.state.param_groups import AddedGroups, add_saved_groups, match_groups, require_groups
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.rank_state import RankState, restored_state, shared_data_state, sums_of
from harness.checkpoint.state.schedules import compare_schedules, reset_schedules
from harness.checkpoint.state.trainer_state import (
    FILE,
    AnyWatched,
    PartState,
    TrainerState,
    Watched,
    read_trainer_state,
)
from harness.data.resumable_loader import DataState
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError

_SHOWN = 3
# An optimizer's live parameter groups, each with the names of its parameters.
LiveGroups = Sequence[tuple[Mapping[str, Any], Sequence[str]]]


@dataclass(frozen=True)
class Resumed:
    """Where a run continues.

    Args:
        name: of the checkpoint.
        state: of the trainer.
        rank_state: this rank's own; None if the number of ranks has changed.
        data: this rank's position in the data, or else the generators that all ranks share.
        sums: metrics that were logged and not reduced, which this rank continues with.
    """

    name: str
    state: TrainerState
    rank_state: RankState | None
    data: DataState
    sums: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class GlobalBatch:
    """The size of an optimizer step.

    Args:
        num_samples: of all ranks together.
        world_size: number of ranks.
    """

    num_samples: int
    world_size: int


@dataclass(frozen=True)
class PreviousRun:
    """What is known of the previous attempt before anything is restored.

    Args:
        batch: size of its optimizer steps; None if unknown.
        states: states of what was registered, as JSON values, by name.
    """

    batch: GlobalBatch | None = None
    states: Mapping[str, Any] = field(default_factory=dict)


def read_previous_run(checkpoints: Sequence[Path]) -> PreviousRun:
    """Read the trainer state of the first readable checkpoint. Not collective; empty if none is readable."""
    for path in checkpoints:
        try:
            state = read_trainer_state(path, read_manifest(path))
        except CheckpointError:
            continue  # reported when it is restored
        size = state.samples_per_batch
        batch = None if size is None else GlobalBatch(size * state.accumulation, len(state.ranks))
        return PreviousRun(batch, state.states)
    return PreviousRun()


def resume(
    found: FoundCheckpoints,
    accelerator: Accelerator,
    collectives: Collectives,
    watched: AnyWatched,
    remote_files: RemoteFiles,
    say: Callable[[str], None],
    *,
    resets_scheduler: bool = False,
) -> Resumed | None:
    """Restore the first intact checkpoint.

    Effects: collective; main thread, before training; blocks until every rank has read its part. Damaged checkpoints
    of the run are renamed, so that the run can save under their names. After an error nothing has changed on disk, and
    the model's values are undefined.

    Args:
        found: the same on every rank.
        accelerator: of the run.
        collectives: of all ranks.
        watched: what is restored.
        remote_files: for ranks that do not see the checkpoints.
        say: a line for the user.
        resets_scheduler: use the schedulers as they are constructed now, not the checkpoint's.

    Returns:
        Where the run continues; None if it has no checkpoint.

    Raises:
        CheckpointError: on all ranks, if none of the checkpoints is intact: the run would restart at step 0 in the
            same MLflow run. Or if one cannot be restored for another reason than damage.
    """
    if found.is_empty:
        return None
    first_error: CheckpointError | None = None
    damaged = [path for path, _ in found.damaged]
    for path in found.usable:
        try:
            resumed = _restore(
                path, accelerator, collectives, watched, remote_files, say, resets_scheduler=resets_scheduler
            )
        except DamagedError as error:
            first_error = first_error or error
            damaged.append(path)
            then = "" if path == found.usable[-1] else ", trying the previous one"
            say(f"harness: warning: {path.name} cannot be used{then}: {error}")
            continue
        if collectives.rank == 0:
            set_damaged_aside([path for path in damaged if path.parent == found.checkpoints_dir], say)
        return resumed
    raise _none_is_usable(found, first_error) from first_error


def _none_is_usable(found: FoundCheckpoints, first_error: CheckpointError | None) -> CheckpointError:
    num_all = len(found.usable) + len(found.damaged) + len(found.weights_only)
    if first_error is not None:
        where, why = found.usable[0].parent, f"; the newest: {first_error}"
    else:
        reasons = [reason for _, reason in found.damaged[:_SHOWN]]
        if found.weights_only:
            names = ", ".join(path.name for path in found.weights_only[:_SHOWN])
            reasons.append(f"{names}: only weights were saved (checkpoint.save_weights_only)")
        where, why = found.checkpoints_dir, f": {'; '.join(reasons)}"
    weights = found.weights_only[0] if found.weights_only else "<path>"
    return CheckpointError(
        f"none of the {num_all} checkpoints in {where} can be used{why}; give another run_name, with initial_weights: "
        f"{weights} to start from existing weights"
    )


def set_damaged_aside(damaged: Sequence[Path], say: Callable[[str], None]) -> None:
    """Rename damaged checkpoints, on rank 0, once every rank has stopped reading them."""
    for path in damaged:
        try:
            aside = set_aside(path)
        except OSError as error:
            say(f"harness: warning: {path} is damaged and cannot be renamed ({error.strerror}); move it away")
        else:
            say(f"harness: {path.name} is damaged; it was renamed to {aside.name} and can be removed")


def _restore(
    path: Path,
    accelerator: Accelerator,
    collectives: Collectives,
    watched: AnyWatched,
    remote_files: RemoteFiles,
    say: Callable[[str], None],
    *,
    resets_scheduler: bool,
) -> Resumed:
    """Restore one checkpoint; see `resume`."""
    manifest, files = open_checkpoint(path, collectives, remote_files, say)
    added: list[AddedGroups] = []

    def find() -> LocalShards:
        return find_watched(accelerator, watched, weights_only=False, dtype=None)

    def read() -> TrainerState:
        state = read_trainer_state(path, manifest, files, accelerator.device)
        added.extend(add_saved_groups(watched, state.param_groups, find().groups))
        require_same_trainer(state, watched, find().groups)
        return state

    def finish() -> tuple[Resumed, list[str]]:
        groups = find().groups
        if resets_scheduler:
            restored, lines = reset_schedules(state, watched, groups)
        else:
            restored, lines = state, compare_schedules(state, watched)
        restore_trainer(restored, watched, groups, accelerator.scaler)
        new = [number for number, match in enumerate(match_groups(state.param_groups, groups)) if match is None]
        lines += [
            f"harness: {path.name}: parameter group {number} is not in the checkpoint: it keeps its initial values"
            for number in new
        ]
        own = restored_state(state.ranks, collectives.rank, collectives.world_size)
        data = shared_data_state(state.ranks) if own is None else own.data
        return Resumed(path.name, restored, own, data, _sums(state, own, collectives.rank)), lines

    try:
        # First what is cheap: a mismatch is refused before gigabytes are read.
        state = collectives.run_on_all_ranks(f"reading {path / FILE}", lambda: files.reading(read))
        records = {part.name: part.optimizer for part in state.parts}
        tensors = restore_tensors(
            accelerator, watched, path, collectives, manifest=manifest, files=files, records=records
        )
        resumed, lines = collectives.run_on_all_ranks(f"restoring {path / FILE}", finish)
    except BaseException:
        for each in added:
            each.undo()
        raise
    for line in (*(f"harness: {path.name}: {note}" for note in tensors.notes), *lines):
        say(line)
    for part in watched.parts:
        if records[part.name].class_name is None and has_unrecorded(part.optimizer):
            say(
                f"harness: warning: {path.name}: an earlier version saved it, without optimizer state that belongs to "
                f"no parameter; {type(innermost(part.optimizer)).__name__} restarts with its initial values"
            )
    return resumed


def _sums(state: TrainerState, own: RankState | None, rank: int) -> Mapping[str, tuple[float, float]]:
    # With another number of ranks, rank 0 continues with the sums of all: they are added up anyway.
    if own is not None:
        return own.sums
    return sums_of(state.ranks) if rank == 0 else {}


# ------------------------------------------------------------- state that is not a tensor


def require_same_trainer(state: TrainerState, watched: AnyWatched, groups: LiveGroups) -> None:
    """Refuse, before anything is changed, the state of another optimizer or scheduler.

    Args:
        state: of the checkpoint.
        watched: for the names of the parts and the schedulers.
        groups: of all optimizers.

    Raises:
        CheckpointError: if the parts, their parameter groups or the schedulers differ.
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


def restore_trainer(state: TrainerState, watched: AnyWatched, groups: LiveGroups, scaler: Any) -> None:
    """Restore the optimizers' groups, the schedulers and the scalers.

    Effects: not collective; main thread; nothing on disk.

    Args:
        state: of the checkpoint.
        watched: for the schedulers and DeepSpeed's loss scales.
        groups: of all optimizers; those that the checkpoint lacks stay as they are.
        scaler: accelerate's gradient scaler, or None.
    """
    for (live, _), number in zip(groups, match_groups(state.param_groups, groups), strict=True):
        assert isinstance(live, dict)
        for key, value in state.param_groups[number].items() if number is not None else ():
            if key != "params":
                _restore_hyperparameter(live, key, value)
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


def _restore_hyperparameter(group: dict[str, Any], key: str, value: Any) -> None:
    live = group.get(key)
    if isinstance(live, torch.Tensor) and live.numel() == torch.as_tensor(value).numel():
        # In place: a captured or compiled step reads this tensor.
        live.copy_(torch.as_tensor(value).reshape(live.shape))
    elif isinstance(live, Enum):
        group[key] = type(live)(value)  # JSON has only its value
    else:
        group[key] = value.item() if isinstance(value, torch.Tensor) and isinstance(live, (int, float)) else value
