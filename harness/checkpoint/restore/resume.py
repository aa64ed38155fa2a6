"""A run goes on: the newest checkpoint that holds, put back into model, optimizer, scheduler and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.checkpoint.format.commit import read_manifest, set_aside
from harness.checkpoint.restore.locate import Found
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.checkpoint.restore.restore import restore_tensors
from harness.checkpoint.restore.restore_trainer import put_back, require_same
from harness.checkpoint.restore.visibility import open_checkpoint
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.optimizer_record import has_unrecorded
from harness.checkpoint.state.param_groups import AddedGroups, add_saved_groups, match_groups
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.rank_state import RankState, restored_state, shared_data_state, sums_of
from harness.checkpoint.state.schedules import compare_schedules, reset_schedules
from harness.checkpoint.state.trainer_state import FILE, AnyWatched, TrainerState, read_trainer_state
from harness.data.resumable_loader import DataState
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError

_SHOWN = 3


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Args:
        name: of the checkpoint.
        state: of the trainer.
        rank_state: this rank's own; None: the ranks are not as many as they were.
        data: of its own, or the generators that all ranks share.
        sums: what this rank goes on with of what was logged and not reduced.
    """

    name: str
    state: TrainerState
    rank_state: RankState | None
    data: DataState
    sums: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class GlobalBatch:
    """What an optimizer step of a run took.

    Args:
        num_samples: of all ranks together.
        world_size: number of ranks.
    """

    num_samples: int
    world_size: int


@dataclass(frozen=True)
class PreviousRun:
    """What is known of a run that goes on, before anything is put back.

    Args:
        batch: what an optimizer step took; None: that is not known.
        states: name -> state, as JSON values, of what else goes on where it was.
    """

    batch: GlobalBatch | None = None
    states: Mapping[str, Any] = field(default_factory=dict)


def look_before(checkpoints: Sequence[Path]) -> PreviousRun:
    """What the first of the checkpoints tells that can be read; nothing, where none can. Reads one file of it."""
    for path in checkpoints:
        try:
            state = read_trainer_state(path, read_manifest(path))
        except CheckpointError:
            continue  # which is told when it is to be put back
        size = state.samples_per_batch
        batch = None if size is None else GlobalBatch(size * state.accumulation, len(state.ranks))
        return PreviousRun(batch, state.states)
    return PreviousRun()


def resume(
    found: Found,
    accelerator: Accelerator,
    collectives: Collectives,
    watched: AnyWatched,
    relay: RemoteFiles,
    say: Callable[[str], None],
    *,
    resets_scheduler: bool = False,
) -> Resumed | None:
    """Put the first of the checkpoints back that holds.

    Effects: collective; main thread, before training; blocks until every rank has read its part. Those of the
    run's own that were damaged are set aside, so that the run can save under their names again when it gets
    there; nothing else on disk, and nothing at all after an error, when the model holds anything.

    Args:
        found: the same on every rank.
        accelerator: which ranks and which strategy.
        collectives: of all ranks.
        watched: what is filled.
        relay: for ranks that do not see the checkpoints.
        say: a line for the user.
        resets_scheduler: take the schedulers' course as they are made now, in place of the checkpoint's.

    Returns:
        Where the run goes on; None where there is no checkpoint at all.

    Raises:
        CheckpointError: on all ranks, if there are checkpoints and none of them holds: it would begin again at
            step 0, in the same MLflow run. Or if one cannot be put back for another reason than damage, which
            would be the same with the one before, or pass.
    """
    if found.is_empty:
        return None
    first_error: CheckpointError | None = None
    damaged = [path for path, _ in found.damaged]
    for path in found.usable:
        try:
            resumed = _put_back(path, accelerator, collectives, watched, relay, say, resets_scheduler=resets_scheduler)
        except DamagedError as error:
            first_error = first_error or error
            damaged.append(path)
            then = "" if path == found.usable[-1] else ", trying the one before"
            say(f"harness: warning: {path.name} cannot be used{then}: {error}")
            continue
        if collectives.rank == 0:
            set_damaged_aside([path for path in damaged if path.parent == found.checkpoints_dir], say)
        return resumed
    raise _none_can_be_used(found, first_error) from first_error


def _none_can_be_used(found: Found, first_error: CheckpointError | None) -> CheckpointError:
    num_all = len(found.usable) + len(found.damaged) + len(found.weights_alone)
    if first_error is not None:
        where, why = found.usable[0].parent, f"; the newest: {first_error}"
    else:
        reasons = [reason for _, reason in found.damaged[:_SHOWN]]
        if found.weights_alone:
            names = ", ".join(path.name for path in found.weights_alone[:_SHOWN])
            reasons.append(f"{names}: hold weights alone (checkpoint.save_weights_only)")
        where, why = found.checkpoints_dir, f": {'; '.join(reasons)}"
    weights = found.weights_alone[0] if found.weights_alone else "<path>"
    return CheckpointError(
        f"none of the {num_all} checkpoints in {where} can be used{why}; give another run_name, with initial_weights: "
        f"{weights} if it is to begin with weights that there are"
    )


def set_damaged_aside(damaged: Sequence[Path], say: Callable[[str], None]) -> None:
    """Rank zero alone: every rank is done with them, and rank zero makes what takes their names."""
    for path in damaged:
        try:
            aside = set_aside(path)
        except OSError as error:
            say(f"harness: warning: {path} is damaged and cannot be renamed ({error.strerror}); move it away")
        else:
            say(f"harness: {path.name} is damaged, and kept as {aside.name}; remove it when you like")


def _put_back(
    path: Path,
    accelerator: Accelerator,
    collectives: Collectives,
    watched: AnyWatched,
    relay: RemoteFiles,
    say: Callable[[str], None],
    *,
    resets_scheduler: bool,
) -> Resumed:
    manifest, files = open_checkpoint(path, collectives, relay, say)

    added: list[AddedGroups] = []

    def read() -> TrainerState:
        state = read_trainer_state(path, manifest, files, accelerator.device)
        added.extend(add_saved_groups(watched, state.param_groups, find().groups))
        require_same(state, watched, find().groups)
        return state

    def find() -> LocalShards:
        return find_watched(accelerator, watched, weights_only=False, dtype=None)

    def finish() -> tuple[Resumed, list[str]]:
        groups = find().groups
        if resets_scheduler:
            restored, lines = reset_schedules(state, watched, groups)
        else:
            restored, lines = state, compare_schedules(state, watched)
        put_back(restored, watched, groups, accelerator.scaler)
        new = [number for number, match in enumerate(match_groups(state.param_groups, groups)) if match is None]
        lines += [
            f"harness: {path.name}: parameter group {number} is not in the checkpoint: it keeps its initial values"
            for number in new
        ]
        own = restored_state(state.ranks, collectives.rank, collectives.world_size)
        data = shared_data_state(state.ranks) if own is None else own.data
        return Resumed(path.name, restored, own, data, _sums(state, own, collectives.rank)), lines

    try:
        # What takes no time first: that is refused before gigabytes are read.
        state = collectives.run_on_all_ranks(f"reading {path / FILE}", lambda: files.reading(read))
        records = {part.name: part.optimizer for part in state.parts}
        tensors = restore_tensors(
            accelerator, watched, path, collectives, manifest=manifest, files=files, records=records
        )
        resumed, lines = collectives.run_on_all_ranks(f"putting back {path / FILE}", finish)
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
    """Of another number of ranks, what was logged is rank zero's: it is to be summed up anyway."""
    if own is not None:
        return own.sums
    return sums_of(state.ranks) if rank == 0 else {}
