from __future__ import annotations

import pytest

from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError, DataError


def test_result_is_rank_zeros_own_when_there_is_one_rank() -> None:
    agreement = Collectives(0, 1)
    assert agreement.from_rank_zero("make it", lambda: {"a": 1}) == {"a": 1}
    assert agreement.gather("values", "x") == ["x"]


def test_error_is_what_was_raised_when_there_is_one_rank() -> None:
    def fail() -> None:
        raise CheckpointError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        Collectives(0, 1).from_rank_zero("save", fail)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (DamagedError("a digest"), DamagedError, "a digest"),
        (CheckpointError("another model"), CheckpointError, "another model"),
        (DataError("no file"), CheckpointError, "no file"),
        (KeyError("lr"), CheckpointError, "reading it: KeyError: 'lr'"),
    ],
)
def test_class_and_cause_are_kept_when_it_fails_together(error: Exception, kind: type, said: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(CheckpointError) as caught:
        Collectives(0, 1).together("reading it", fail)
    assert (type(caught.value), str(caught.value)) == (kind, said)
    assert caught.value is error or caught.value.__cause__ is error
