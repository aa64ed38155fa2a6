from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.metrics.step_timer import GAUGES, StepTimer, over_ranks, percentile


@given(st.lists(st.floats(0, 1e3), min_size=1), st.floats(0, 1))
def test_percentile_is_one_of_the_values_and_covers_its_share_when_sorted(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = percentile(ordered, share)
    assert found in ordered
    assert sum(v <= found for v in ordered) >= share * len(ordered) - 1e-9


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.75, 3.0), (0.99, 4.0), (1.0, 4.0)])
def test_percentile_is_of_the_nearest_rank_when_between_values(share: float, expected: float) -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], share) == expected


def test_percentile_is_zero_when_there_is_no_value() -> None:
    assert percentile([], 0.5) == 0.0


def test_gauges_are_zero_when_no_step_was_done() -> None:
    assert set(StepTimer().pop().values()) == {0.0}


def test_first_step_is_not_counted_when_nothing_was_resumed() -> None:
    timer = StepTimer()
    timer.step(8)
    assert timer.pop()["steps_per_s"] == 0.0


def test_rates_are_of_the_window_when_taken() -> None:
    timer = StepTimer()
    timer.resume()
    for _ in range(4):
        timer.step(8)
    gauges = timer.pop()
    assert gauges["samples_per_s"] == pytest.approx(8 * gauges["steps_per_s"])
    assert 0 < gauges["step_time_p50_s"] <= gauges["step_time_p99_s"]
    assert {*gauges, "memory_bytes"} == set(GAUGES)
    empty = timer.pop()
    assert empty["steps_per_s"] == empty["samples_per_s"] == 0.0
    assert empty["step_time_p50_s"] == gauges["step_time_p50_s"]  # over the latest steps, not the window


def test_job_has_the_slowest_rate_and_the_spread_when_ranks_differ() -> None:
    values = over_ranks(
        {
            "steps_per_s": (4.0, 2.0, 3.0),
            "samples_per_s": (40.0, 20.0, 30.0),
            "step_time_p50_s": (0.25, 0.5, 0.3),
            "step_time_p99_s": (0.4, 0.9, 0.5),
            "memory_bytes": (10.0, 30.0, 20.0),
        }
    )
    assert values == {
        "perf/steps_per_s": 2.0,
        "perf/samples_per_s": 90.0,
        "perf/step_time_p50_s": 0.3,
        "perf/step_time_p99_s": 0.9,
        "perf/step_time_spread_s": 0.25,
        "perf/memory_max_bytes": 30.0,
    }
