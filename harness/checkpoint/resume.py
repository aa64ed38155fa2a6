"""A run goes on: the newest checkpoint that holds, put back into model, optimizer, scheduler and trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from harness.agreement import Agreement
from harness.checkpoint.commit import MANIFEST, Manifest, list_checkpoints, read_manifest
from harness.checkpoint.rank_state import RankState, of_rank, sums_of
from harness.checkpoint.read import check_ranges
from harness.checkpoint.restore import materialize, restore_tensors
from harness.checkpoint.shards.held import Held, find_held, innermost
from harness.checkpoint.trainer_state import FILE, Watched, put_back
from harness.errors import CheckpointError


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Args:
        name: of the checkpoint.
        epoch: epochs that are complete.
        step: optimizer steps that are complete.
        batches_in_epoch: of the running epoch, that each rank of then had taken.
        samples_per_batch: of all ranks of then together.
        metrics: the latest reduced metrics.
        states: of what was registered by name.
        rank_state: this rank's own; None: the ranks are not as many as they were.
        sums: what this rank goes on with of what was logged and not reduced.
        world_size: of the ranks that wrote it.
    """

    name: str
    epoch: int
    step: int
    batches_in_epoch: int
    samples_per_batch: int | None
    metrics: Mapping[str, float]
    states: Mapping[str, Any]
    rank_state: RankState | None
    sums: Mapping[str, tuple[float, float]]
    world_size: int


def find_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """The committed checkpoints that training can go on from, newest first. Rank zero's to decide."""
    return [
        checkpoints_dir / name
        for name, manifest in reversed(list_checkpoints(checkpoints_dir))
        if any(file.name == FILE for file in manifest.files)
    ]


def samples_per_step(checkpoints: Sequence[Path]) -> int | None:
    """What an optimizer step of all ranks took, by the first of the checkpoints that tells. Not verified yet."""
    for path in checkpoints:
        try:
            position = json.loads((path / FILE).read_text())["position"]
            return int(position["samples_per_batch"] * position["accumulation"])
        except (OSError, ValueError, TypeError, KeyError):
            continue  # it is told when it is to be put back
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
    held = _prepared(accelerator, agreement, watched)
    for path in checkpoints:
        try:
            return _put_back(path, accelerator, agreement, watched, held)
        except CheckpointError as error:
            first_error = first_error or error
            say(f"harness: warning: {path.name} cannot be used, trying the one before: {error}")
    assert first_error is not None
    raise CheckpointError(
        f"none of the {len(checkpoints)} checkpoints in {checkpoints[0].parent} can be used; the newest: {first_error}"
    ) from first_error


def _prepared(accelerator: Accelerator, agreement: Agreement, watched: Watched) -> Held:
    failure: CheckpointError | None = None
    held: Held | None = None
    try:
        if watched.optimizer is not None:
            materialize(innermost(watched.optimizer))
        held = find_held(accelerator, watched.model, watched.optimizer, weights_only=False, dtype=None, restoring=True)
    except CheckpointError as error:
        failure = error
    _raise_alike(agreement, "whether the optimizer can be restored", failure)
    assert held is not None
    return held


def _put_back(path: Path, accelerator: Accelerator, agreement: Agreement, watched: Watched, held: Held) -> Resumed:
    restore_tensors(held, path, agreement)
    failure: CheckpointError | None = None
    try:
        manifest = read_manifest(path)
        state = _read_state(path, manifest)
        put_back(state, watched, held.groups, accelerator.scaler)
        ranks, position = state["ranks"], state["position"]
        own = of_rank(ranks, agreement.rank, agreement.world_size)
        found = Resumed(
            name=path.name,
            epoch=position["epoch"],
            step=state["step"],
            batches_in_epoch=position["batches"],
            samples_per_batch=position["samples_per_batch"],
            metrics=state["metrics"],
            states=state["states"],
            rank_state=own,
            sums=own.sums if own is not None else sums_of(ranks) if agreement.rank == 0 else {},
            world_size=len(ranks),
        )
    except CheckpointError as error:
        failure = error
    except Exception as error:
        failure = CheckpointError(f"{path / FILE}: is not understood: {type(error).__name__}: {error}")
    _raise_alike(agreement, "what the trainer's state is", failure)
    return found


def _read_state(path: Path, manifest: Manifest) -> Any:
    record = next((file for file in manifest.files if file.name == FILE), None)
    if record is None:
        raise CheckpointError(f"{path / MANIFEST}: has weights only, so training cannot go on from it")
    check_ranges(path / FILE, record, range(len(record.ranges)))
    try:
        return json.loads((path / FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / FILE}: cannot be read: {error}") from error


def _raise_alike(agreement: Agreement, what: str, failure: CheckpointError | None) -> None:
    told = agreement.gather(what, None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: {text}")
