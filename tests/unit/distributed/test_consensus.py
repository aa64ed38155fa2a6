from __future__ import annotations

import pytest

from harness.distributed.consensus import Consensus


def test_own_vote_is_read_when_there_is_one_process() -> None:
    votes = Consensus(None)
    assert votes.read() is None
    votes.cast([15, 0])
    assert votes.read() == [15, 0]
    assert votes.read() is None


def test_vote_can_be_cast_at_any_time_when_there_is_one_process() -> None:
    votes = Consensus(None)
    votes.adapt_interval(0.001)
    assert votes.is_due
    votes.cast([0, 0])
    assert not votes.is_pending  # no request
    votes.cast([0, 1])
    assert votes.is_pending


def test_vote_is_refused_when_the_previous_one_is_pending() -> None:
    votes = Consensus(None)
    votes.cast([0, 1])
    with pytest.raises(AssertionError, match="before the previous one was read"):
        votes.cast([0, 0])
