from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.config.cadence import Cadence, Patience, is_better
from harness.config.schema import Mode


@given(st.integers(1, 9), st.integers(1, 60))
def test_due_every_n_when_counting(every_n: int, num_done: int) -> None:
    due = [n for n in range(1, num_done + 1) if Cadence(every_n, None).is_due_after_epoch(n)]
    assert due == list(range(every_n, num_done + 1, every_n))
    assert due == [n for n in range(1, num_done + 1) if Cadence(None, every_n).is_due_after_step(n)]


@given(st.integers(1, 9), st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_due_once_per_multiple_when_steps_jump(every_n: int, jumps: list[int]) -> None:
    cadence, before = Cadence(None, every_n), 0
    for jump in jumps:
        passes = any(n % every_n == 0 for n in range(before + 1, before + jump + 1))
        assert cadence.is_due_after_step(before + jump, before) == passes
        before += jump


def test_nothing_is_due_when_no_cadence_is_set() -> None:
    never = Cadence(None, None)
    assert not any(never.is_due_after_epoch(n) or never.is_due_after_step(n) for n in range(1, 50))


def test_epochs_and_steps_are_separate_when_both_are_set() -> None:
    both = Cadence(every_n_epochs=2, every_n_steps=3)
    assert both.is_due_after_epoch(2) and not both.is_due_after_epoch(3)
    assert both.is_due_after_step(3) and not both.is_due_after_step(2)


@pytest.mark.parametrize(
    ("value", "best", "mode", "expected"),
    [
        (1.0, None, "min", True),
        (1.0, 2.0, "min", True),
        (2.0, 1.0, "min", False),
        (2.0, 1.0, "max", True),
        (1.0, 1.0, "min", False),
        (1.0, 1.0, "max", False),
        (math.nan, None, "min", False),
        (math.nan, 1.0, "max", False),
    ],
)
def test_better_is_strict_and_never_nan(value: float, best: float | None, mode: Mode, expected: bool) -> None:
    assert is_better(value, best, mode) is expected


def test_patience_ends_when_nothing_improves() -> None:
    patience = Patience("min", 2)
    assert [patience.is_exhausted_by(v) for v in (3.0, 4.0, 2.0, 2.0, math.nan)] == [False, False, False, False, True]
    assert patience.best == 2.0


def test_patience_of_one_ends_when_one_value_is_not_better() -> None:
    patience = Patience("max", 1)
    assert [patience.is_exhausted_by(v) for v in (1.0, 2.0, 1.5)] == [False, False, True]
