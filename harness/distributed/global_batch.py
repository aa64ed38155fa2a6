"""Keep the global batch, and with it the optimizer steps, on another number of ranks.

A step uses `ranks x batch size x accumulated batches` consecutive samples of the sampler's order. If that product is
the same on another number of ranks, the same samples form a step.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch: samples in a rank's batch, and batches of a rank in an optimizer step."""

    batch_size: int
    accumulation: int
    keeps_global_batch: bool


def plan_batches(samples_per_step: int, world_size: int, batch_size: int, accumulation: int) -> BatchPlan:
    """Divide a global batch of `samples_per_step` among ranks, in batches no larger than the configured `batch_size`.

    If it cannot be divided, the plan has the configured values and does not keep the global batch.
    """
    per_rank, rest = divmod(samples_per_step, world_size)
    if rest or not per_rank:
        return BatchPlan(batch_size, accumulation, keeps_global_batch=False)
    size = next(size for size in range(min(batch_size, per_rank), 0, -1) if per_rank % size == 0)
    return BatchPlan(size, per_rank // size, keeps_global_batch=True)
