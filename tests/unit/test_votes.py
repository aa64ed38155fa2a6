from __future__ import annotations

import pytest

from harness.votes import Votes


def test_own_vote_is_read_when_there_is_one_process() -> None:
    votes = Votes(None)
    assert votes.read() is None
    votes.cast([15, 0])
    assert votes.read() == [15, 0]
    assert votes.read() is None


def test_vote_is_due_at_each_step_when_there_is_one_process() -> None:
    votes = Votes(None)
    votes.pace(0.001)
    assert [votes.is_due() for _ in range(3)] == [True] * 3


def test_vote_is_refused_when_the_one_before_is_not_read() -> None:
    votes = Votes(None)
    votes.cast([0, 0])
    with pytest.raises(AssertionError, match="before it was read"):
        votes.cast([0, 0])
