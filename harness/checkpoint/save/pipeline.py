"""What saving needs of one structure of the model and the optimizer's state, made once: plan, memory, writer process.

find what this rank holds -> plan, validated across ranks         before training: may it be saved?
the same -> memory -> writer process -> one copy, measured        once the optimizer has a state
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from harness.checkpoint.save.fence import ModeChoice
from harness.checkpoint.save.plan import Plan, make_plan, plan_of_rank_zero
from harness.checkpoint.save.snapshot import Snapshot, copy_here
from harness.checkpoint.save.staging import StagingMemory
from harness.checkpoint.save.write import WriterProcess
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.checkpoint.state.materialize import check_objects
from harness.checkpoint.state.optimizer_record import added_state, groups_record, record_of
from harness.checkpoint.state.parts import find_watched, find_watched_optimized
from harness.checkpoint.state.trainer_state import AnyWatched
from harness.config.schema import CheckpointConfig
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


@dataclass(frozen=True)
class SavePipeline:
    """What is made once for a structure: of the model, of the optimizer's state."""

    held: LocalShards
    plan: Plan
    staging: StagingMemory
    snapshot: Snapshot
    writer: WriterProcess
    mode: ModeChoice

    def close(self) -> None:
        """End the writer process, and give the memory back. Not collective."""
        self.writer.close()
        self.staging.close()


def plan_saves(
    accelerator: Accelerator,
    collectives: Collectives,
    config: CheckpointConfig,
    watched: AnyWatched,
    *,
    is_rank_zeros: bool = False,
) -> tuple[LocalShards, Plan]:
    """Find what this rank holds, and plan; if one rank does not understand its state, all say so.

    Effects: collective; main thread; nothing on disk.

    Args:
        accelerator: which ranks and which strategy.
        collectives: of all ranks.
        config: what to save of it.
        watched: what there is to save.
        is_rank_zeros: ranks hold all of it, and different values: rank zero's are to be saved.

    Raises:
        CheckpointError: on all ranks, if the model's sharding or the optimizer's state is not understood.
    """

    def find() -> tuple[LocalShards, list[int]]:
        # First, so that every rank gets there: an optimizer's own state_dict() may be collective.
        is_resumable = not config.save_weights_only
        added = [added_state(part.optimizer) for part in watched.parts] if is_resumable else []
        held = find_watched(
            accelerator,
            watched,
            weights_only=config.save_weights_only,
            dtype=None if config.dtype is None else getattr(torch, config.dtype),
        )
        if is_resumable:
            # What belongs to no parameter is refused as early: here nothing comes of it.
            groups_record(held, KeptTensors())
            hashes = []
            for part, each in zip(watched.parts, added, strict=True):
                kept = KeptTensors()
                hashes.append(kept.hash_with(record_of(part.optimizer, each, kept)))
            for part, stepped in find_watched_optimized(watched) if held.trees else ():
                check_objects(innermost(part.optimizer), stepped, held.forms)
            return held, hashes
        return held, []

    held, hashes = collectives.run_on_all_ranks("finding what is to be saved", find)
    # Where ranks had different numbers of steps, that is known, and rank zero's state is saved.
    if hashes and not is_rank_zeros:
        _require_alike(collectives, watched, hashes)
    plan = plan_of_rank_zero if is_rank_zeros else make_plan
    return held, plan(held, collectives, config.max_shard_size_bytes)


def _require_alike(collectives: Collectives, watched: AnyWatched, hashes: Sequence[int]) -> None:
    """Refuse, on all ranks, optimizer state that belongs to no parameter and is not the same on every rank.

    Raises:
        CheckpointError: with the optimizer and the rank.
    """
    told = collectives.all_gather_numbers("optimizer state that belongs to no parameter", hashes)
    for rank, theirs in enumerate(told):
        for part, mine, other in zip(watched.parts, told[0], theirs, strict=True):
            if mine != other:
                raise CheckpointError(
                    f"{type(innermost(part.optimizer)).__name__}: state that belongs to no parameter differs between "
                    f"rank 0 and rank {rank}, and a checkpoint holds rank 0's; keep it the same on all ranks, or use "
                    "checkpoint.save_weights_only"
                )


def make_engine(
    accelerator: Accelerator,
    collectives: Collectives,
    config: CheckpointConfig,
    watched: AnyWatched,
    *,
    is_rank_zeros: bool = False,
) -> SavePipeline:
    """Plan, allocate, and copy once, on all ranks or on none.

    Effects: collective; main thread; blocks for the allocation and the copy; leaves a writer process on each rank.

    Args:
        accelerator: which ranks and which strategy.
        collectives: of all ranks.
        config: what to save of it.
        watched: what there is to save.
        is_rank_zeros: see `plan_saves`.

    Raises:
        CheckpointError: on all ranks, if one of them has not the memory, or does not understand its state.
    """
    held, plan = plan_saves(accelerator, collectives, config, watched, is_rank_zeros=is_rank_zeros)
    engine: SavePipeline | None = None
    failure: Exception | None = None
    try:
        engine = _make(held, plan, accelerator.device, makes_files=collectives.rank == 0)
    except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
        failure = error
    # All or none: a rank without memory must not leave the others waiting at the first save.
    reason = None if failure is None else str(failure) or type(failure).__name__
    told = collectives.all_gather(
        "the preparation of checkpoints", (reason, _is_of_memory(failure), plan.staging_bytes)
    )
    failed = [(rank, *each) for rank, each in enumerate(told) if each[0] is not None]
    if not failed:
        assert engine is not None
        return engine
    if engine is not None:
        engine.close()
    rank, reason, is_of_memory, size_bytes = failed[0]
    what, remedy = f"rank {rank} cannot prepare to save", "use checkpoint.save_weights_only"
    if is_of_memory:
        what += f" ({size_bytes:,} bytes of host memory)"
        remedy = f"give the node more memory, more ranks, or {remedy}"
    raise CheckpointError(f"{what}: {reason}; {remedy}") from failure


def _is_of_memory(failure: Exception | None) -> bool:
    # torch has no class of its own for what its allocators are refused.
    is_refused = isinstance(failure, OSError) and failure.errno in (errno.ENOMEM, errno.ENOSPC, errno.EFBIG)
    return is_refused or isinstance(failure, MemoryError) or "memory" in str(failure).lower()


def _make(held: LocalShards, plan: Plan, device: torch.device, *, makes_files: bool) -> SavePipeline:
    staging = StagingMemory(plan.staging_bytes, pinned=device.type == "cuda")
    writer = WriterProcess(staging, plan.layout, plan.ranges, makes_files=makes_files)
    try:
        snapshot = Snapshot(held, plan, staging, device)
        writer.start()
        snapshot.look_up()
        begun_s = time.perf_counter()
        copy_here(snapshot.begin())
        mode = ModeChoice(time.perf_counter() - begun_s)
    except BaseException:
        writer.close()
        staging.close()
        raise
    return SavePipeline(held, plan, staging, snapshot, writer, mode)
