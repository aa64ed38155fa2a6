"""Keep the global batch, and with it the optimizer steps, on another number of ranks.

A step uses `ranks x batch size x accumulated batches` consecutive samples of the sampler's order. On another number of
ranks the same samples form a step if that product is the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch is divided.

    Args:
        batch_size: samples in each rank's batch.
        accumulation: batches of each rank in an optimizer step.
        keeps_global_batch: whether the product is the global batch.
    """

    batch_size: int
    accumulation: int
    keeps_global_batch: bool


def plan_batches(samples_per_step: int, world_size: int, batch_size: int, accumulation: int) -> BatchPlan:
    """Divide a global batch among ranks, in batches no larger than the configured ones.

    Args:
        samples_per_step: the global batch.
        world_size: number of ranks.
        batch_size: configured batch size of a rank, which its memory allows.
        accumulation: configured accumulation, used if the global batch cannot be divided.
    """
    per_rank, rest = divmod(samples_per_step, world_size)
    if rest or not per_rank:
        return BatchPlan(batch_size, accumulation, keeps_global_batch=False)
    size = next(size for size in range(min(batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return BatchPlan(size, per_rank // size, keeps_global_batch=True)
