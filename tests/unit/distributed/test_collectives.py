from __future__ import annotations

import pytest

from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError, DataError


def test_own_value_is_returned_when_there_is_one_rank() -> None:
    collectives = Collectives(0, 1)
    assert collectives.broadcast_from_rank_zero("make it", lambda: {"a": 1}) == {"a": 1}
    assert collectives.all_gather("values", "x") == ["x"]


def test_error_is_raised_unchanged_when_there_is_one_rank() -> None:
    def fail() -> None:
        raise CheckpointError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        Collectives(0, 1).broadcast_from_rank_zero("save", fail)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DamagedError("a digest"), DamagedError, "a digest"),
        (CheckpointError("another model"), CheckpointError, "another model"),
        (DataError("no file"), CheckpointError, "no file"),
        (KeyError("lr"), CheckpointError, "reading it: KeyError: 'lr'"),
    ],
)
def test_class_and_cause_are_kept_when_local_work_fails(error: Exception, kind: type, message: str) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(CheckpointError) as caught:
        Collectives(0, 1).run_on_all_ranks("reading it", fail)
    assert (type(caught.value), str(caught.value)) == (kind, message)
    assert caught.value is error or caught.value.__cause__ is error


def test_own_flags_are_counted_when_there_is_one_rank() -> None:
    assert Collectives(0, 1).start_count("flags", [True, False]).wait() == [1, 0]
