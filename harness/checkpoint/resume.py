"""A run goes on: the newest checkpoint that holds, put back into model, optimizer, scheduler and trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from harness.agreement import Agreement
from harness.batches import DataState
from harness.checkpoint.commit import read_manifest
from harness.checkpoint.rank_state import RankState, of_rank, order_of, sums_of
from harness.checkpoint.restore import restore_tensors
from harness.checkpoint.shards.held import find_held
from harness.checkpoint.trainer_state import FILE, TrainerState, Watched, put_back, read_trainer_state
from harness.errors import CheckpointError


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


def global_batch(checkpoints: Sequence[Path]) -> GlobalBatch | None:
    """What an optimizer step took, by the first of the checkpoints that tells; None: none does."""
    for path in checkpoints:
        try:
            state = read_trainer_state(path, read_manifest(path))
        except CheckpointError:
            continue  # which is told when it is to be put back
        if state.samples_per_batch is None:
            return None
        return GlobalBatch(state.samples_per_batch * state.accumulation, len(state.ranks))
    return None


def resume(
    checkpoints: Sequence[Path],
    accelerator: Accelerator,
    agreement: Agreement,
    watched: Watched,
    say: Callable[[str], None],
) -> Resumed | None:
    """Put the first of the checkpoints back that holds.

    Effects: collective; main thread, before training; blocks until every rank has read its part; nothing on
    disk. After an error the model holds anything.

    Args:
        checkpoints: the same on every rank, the one to try first first.
        accelerator: which ranks and which strategy.
        agreement: of all ranks.
        watched: what is filled.
        say: a line for the user.

    Returns:
        Where the run goes on; None where there is no checkpoint at all.

    Raises:
        CheckpointError: on all ranks, if none of them holds: the first one's reason.
    """
    if not checkpoints:
        return None
    first_error: CheckpointError | None = None
    for path in checkpoints:
        try:
            return _put_back(path, accelerator, agreement, watched, say)
        except CheckpointError as error:
            first_error = first_error or error
            say(f"harness: warning: {path.name} cannot be used, trying the one before: {error}")
    assert first_error is not None
    raise CheckpointError(
        f"none of the {len(checkpoints)} checkpoints in {checkpoints[0].parent} can be used; the newest: {first_error}"
    ) from first_error


def _put_back(
    path: Path, accelerator: Accelerator, agreement: Agreement, watched: Watched, say: Callable[[str], None]
) -> Resumed:
    restored = restore_tensors(accelerator, watched, path, agreement)
    for note in restored.notes:
        say(f"harness: {path.name}: {note}")
    failure: CheckpointError | None = None
    try:
        state = read_trainer_state(path, read_manifest(path))
        held = find_held(accelerator, watched.model, watched.optimizer, weights_only=False, dtype=None, restoring=True)
        put_back(state, watched, held.groups, accelerator.scaler)
        own = of_rank(state.ranks, agreement.rank, agreement.world_size)
        data = order_of(state.ranks) if own is None else own.data
        found = Resumed(path.name, state, own, data, _sums(state, own, agreement.rank))
    except CheckpointError as error:
        failure = error
    except Exception as error:
        failure = CheckpointError(f"{path / FILE}: is not understood: {type(error).__name__}: {error}")
    _raise_alike(agreement, "what the trainer's state is", failure)
    return found


def _sums(state: TrainerState, own: RankState | None, rank: int) -> Mapping[str, tuple[float, float]]:
    """Of another number of ranks, what was logged is rank zero's: it is to be summed up anyway."""
    if own is not None:
        return own.sums
    return sums_of(state.ranks) if rank == 0 else {}


def _raise_alike(agreement: Agreement, what: str, failure: CheckpointError | None) -> None:
    told = agreement.gather(what, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}")
