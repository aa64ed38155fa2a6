from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.distributed.global_batch import BatchPlan, plan_batches


@pytest.mark.parametrize(
    ("samples", "world_size", "batch_size", "expected"),
    [
        (64, 2, 32, BatchPlan(32, 1, True)),  # nothing changes
        (64, 1, 32, BatchPlan(32, 2, True)),  # half the ranks: twice the batches
        (64, 4, 32, BatchPlan(16, 1, True)),  # twice the ranks: half the batch
        (96, 4, 16, BatchPlan(12, 2, True)),
        (64, 3, 32, BatchPlan(32, 5, False)),  # cannot be divided: as configured
        (2, 4, 32, BatchPlan(32, 5, False)),
    ],
)
def test_global_batch_is_divided_when_the_ranks_change(
    samples: int, world_size: int, batch_size: int, expected: BatchPlan
) -> None:
    assert plan_batches(samples, world_size, batch_size, accumulation=5) == expected


@given(st.integers(1, 4096), st.integers(1, 64), st.integers(1, 512))
def test_no_batch_is_larger_when_the_global_batch_is_kept(samples: int, world_size: int, batch_size: int) -> None:
    plan = plan_batches(samples, world_size, batch_size, 1)
    assert plan.keeps_global_batch == (samples % world_size == 0)
    if plan.keeps_global_batch:
        assert plan.batch_size * plan.accumulation * world_size == samples
        assert plan.batch_size <= batch_size
