from __future__ import annotations

import pytest

from harness.agreement import Agreement
from harness.errors import CheckpointError


def test_result_is_rank_zeros_own_when_there_is_one_rank() -> None:
    agreement = Agreement(0, 1)
    assert agreement.from_rank_zero("make it", lambda: {"a": 1}) == {"a": 1}
    assert agreement.gather("values", "x") == ["x"]


def test_error_is_what_was_raised_when_there_is_one_rank() -> None:
    def fail() -> None:
        raise CheckpointError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        Agreement(0, 1).from_rank_zero("save", fail)
