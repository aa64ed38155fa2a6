"""The same optimizer step on another number of ranks: the global batch is kept where it can be divided.

A step takes `ranks x batch size x accumulated batches` consecutive samples of the sampler's order. On other
ranks the same samples make a step where that number is the same, whatever it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided.

    Args:
        batch_size: samples of each rank's batch.
        accumulation: batches of each rank for an optimizer step.
        is_kept: whether the global batch is what was asked for.
    """

    batch_size: int
    accumulation: int
    is_kept: bool


def plan_batches(samples_per_step: int, world_size: int, batch_size: int, accumulation: int) -> BatchPlan:
    """Divide a global batch among ranks, in batches no larger than the configured ones.

    Args:
        samples_per_step: the global batch to keep.
        world_size: number of ranks.
        batch_size: configured for each rank, which its memory holds.
        accumulation: configured, for where the global batch cannot be kept.
    """
    of_each, left = divmod(samples_per_step, world_size)
    if left or not of_each:
        return BatchPlan(batch_size, accumulation, is_kept=False)
    size = next(size for size in range(min(batch_size, of_each), 0, -1) if of_each % size == 0)
    return BatchPlan(size, of_each // size, is_kept=True)
