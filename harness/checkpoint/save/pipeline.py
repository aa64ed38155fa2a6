"""What saves of one structure of the model and the optimizer share: plan, staging memory, writer process.

find what this rank holds -> plan, validated across ranks     before training: can it be saved?
the same -> memory -> writer process -> one timed copy        once the optimizer has a state
capture the state that is not a tensor of the plan            at each save
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from harness.checkpoint.save.fence import ModeChoice
from harness.checkpoint.save.hooks import CheckpointHooks
from harness.checkpoint.save.plan import Plan, make_plan, make_rank_zero_plan
from harness.checkpoint.save.snapshot import Snapshot, StagingMemory, copy_now
from harness.checkpoint.save.writer_client import WriterProcess
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.materialize import check_objects
from harness.checkpoint.state.optimizer_record import added_state, groups_record, record_of
from harness.checkpoint.state.parts import find_watched, find_watched_optimized
from harness.checkpoint.state.rank_state import RankState
from harness.checkpoint.state.trainer_state import AnyWatched, Moment, capture_trainer_state
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


@dataclass(frozen=True)
class SavePipeline:
    """Serves all saves until the structure changes.

    Args:
        shards: what this rank holds.
        plan: what of it this rank writes.
        staging: host memory for the plan's pieces.
        snapshot: copies them.
        writer: writes them.
        mode: whether copies overlap training.
    """

    shards: LocalShards
    plan: Plan
    staging: StagingMemory
    snapshot: Snapshot
    writer: WriterProcess
    mode: ModeChoice

    def close(self) -> None:
        """End the writer process and free the memory. Not collective."""
        self.writer.close()
        self.staging.close()


def plan_saves(
    accelerator: Accelerator,
    collectives: Collectives,
    config: CheckpointConfig,
    watched: AnyWatched,
    *,
    rank_zero_only: bool = False,
) -> tuple[LocalShards, Plan]:
    """Find what this rank holds, and plan.

    Effects: collective; main thread; nothing on disk.

    Args:
        accelerator: of the run.
        collectives: of all ranks.
        config: what to save.
        watched: models, optimizers and schedulers.
        rank_zero_only: save rank 0's values, because replicas may differ.

    Raises:
        CheckpointError: on all ranks, if the model's sharding or the optimizer's state is not understood on one.
    """

    def find() -> tuple[LocalShards, list[int]]:
        is_resumable = not config.save_weights_only
        # First, so that every rank calls it: an optimizer's own state_dict() may be collective.
        added = [added_state(part.optimizer) for part in watched.parts] if is_resumable else []
        shards = find_watched(
            accelerator,
            watched,
            weights_only=config.save_weights_only,
            dtype=None if config.dtype is None else getattr(torch, config.dtype),
        )
        hashes: list[int] = []
        if is_resumable:
            # The records are only checked here; each save makes them again.
            groups_record(shards, KeptTensors())
            for part, each in zip(watched.parts, added, strict=True):
                kept = KeptTensors()
                hashes.append(kept.hash_with(record_of(part.optimizer, each, kept)))
            for part, stepped in find_watched_optimized(watched) if shards.trees else ():
                check_objects(innermost(part.optimizer), stepped, shards.forms)
        return shards, hashes

    shards, hashes = collectives.run_on_all_ranks("finding what is to be saved", find)
    # Replicas that took different numbers of steps may differ; rank 0's state is saved.
    if hashes and not rank_zero_only:
        _require_alike(collectives, watched, hashes)
    plan = make_rank_zero_plan if rank_zero_only else make_plan
    return shards, plan(shards, collectives, config.max_shard_size_bytes)


def _require_alike(collectives: Collectives, watched: AnyWatched, hashes: Sequence[int]) -> None:
    """Refuse, on all ranks, optimizer state that belongs to no parameter and differs between ranks.

    Raises:
        CheckpointError: with the optimizer and the rank.
    """
    gathered = collectives.all_gather_numbers("optimizer state that belongs to no parameter", hashes)
    for rank, theirs in enumerate(gathered):
        for part, first, other in zip(watched.parts, gathered[0], theirs, strict=True):
            if first != other:
                raise CheckpointError(
                    f"{type(innermost(part.optimizer)).__name__}: state that belongs to no parameter differs between "
                    f"rank 0 and rank {rank}, and a checkpoint holds rank 0's; keep it the same on all ranks, or use "
                    "checkpoint.save_weights_only"
                )


def make_pipeline(
    accelerator: Accelerator,
    collectives: Collectives,
    config: CheckpointConfig,
    watched: AnyWatched,
    *,
    rank_zero_only: bool = False,
) -> SavePipeline:
    """Plan, allocate and copy once, on all ranks or on none.

    Effects: collective; main thread; blocks for the allocation and the copy; leaves a writer process on each rank.

    Args: as `plan_saves`.

    Raises:
        CheckpointError: on all ranks, if one of them cannot allocate, or its state is not understood.
    """
    shards, plan = plan_saves(accelerator, collectives, config, watched, rank_zero_only=rank_zero_only)
    pipeline: SavePipeline | None = None
    failure: Exception | None = None
    try:
        pipeline = _make(shards, plan, accelerator.device, makes_files=collectives.rank == 0)
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        failure = error
    # All or none: the other ranks would wait for a rank without memory at the first save.
    reason = None if failure is None else str(failure) or type(failure).__name__
    results = collectives.all_gather(
        "the preparation of checkpoints", (reason, _is_out_of_memory(failure), plan.staging_bytes)
    )
    failed = [(rank, *each) for rank, each in enumerate(results) if each[0] is not None]
    if not failed:
        assert pipeline is not None
        return pipeline
    if pipeline is not None:
        pipeline.close()
    rank, reason, is_out_of_memory, size_bytes = failed[0]
    what, remedy = f"rank {rank} cannot prepare to save", "use checkpoint.save_weights_only"
    if is_out_of_memory:
        what += f" ({size_bytes:,} bytes of host memory)"
        remedy = f"give the node more memory, more ranks, or {remedy}"
    raise CheckpointError(f"{what}: {reason}; {remedy}") from failure


def _is_out_of_memory(failure: Exception | None) -> bool:
    # torch has no class of its own for a failed allocation on the host.
    is_refused = isinstance(failure, OSError) and failure.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
    return is_refused or isinstance(failure, MemoryError) or "memory" in str(failure).lower()


def _make(shards: LocalShards, plan: Plan, device: torch.device, *, makes_files: bool) -> SavePipeline:
    staging = StagingMemory(plan.staging_bytes, pinned=device.type == "cuda")
    writer = WriterProcess(staging, plan.layout, plan.ranges, makes_files=makes_files)
    try:
        snapshot = Snapshot(shards, plan, staging, device)
        writer.start()
        snapshot.look_up()
        begun_s = time.perf_counter()
        copy_now(snapshot.begin())
        mode = ModeChoice(time.perf_counter() - begun_s)
    except BaseException:
        writer.close()
        staging.close()
        raise
    return SavePipeline(shards, plan, staging, snapshot, writer, mode)


@dataclass(frozen=True)
class SmallState:
    """What a save writes beside the tensors of the plan.

    Args:
        trainer_state: JSON values, on rank 0; None elsewhere, or if only weights are saved.
        rank_state: this rank's own; None if only weights are saved.
        tensors: that `trainer_state` refers to, by name.
        failure: why this rank takes no part in the save; None if it does.
    """

    trainer_state: Any = None
    rank_state: RankState | None = None
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    failure: Exception | None = None


def capture_small_state(
    moment: Moment,
    watched: AnyWatched,
    shards: LocalShards,
    hooks: CheckpointHooks,
    accelerator: Accelerator,
    rank: int,
) -> SmallState:
    """Capture as it is now what a resume needs beside the tensors of the plan.

    Effects: calls an optimizer's own `state_dict`, which may be collective: every rank that saves calls this; main
    thread, between steps; copies tensors that belong to no parameter; nothing on disk. A failure is returned, not
    raised: it is this rank's alone.
    """
    state, kept = None, KeptTensors()
    try:
        added = [added_state(part.optimizer) for part in watched.parts]
        if rank == 0:
            groups = groups_record(shards, kept)
            optimizers = [
                record_of(part.optimizer, each, kept) for part, each in zip(watched.parts, added, strict=True)
            ]
            state = capture_trainer_state(moment, watched, groups, optimizers, accelerator.scaler, kept)
        return SmallState(state, hooks.capture_rank_state(), kept.tensors)
    except Exception as error:
        # For example a scheduler's state that could be saved when it was checked.
        return SmallState(failure=error)
