"""Twenty-five SIGKILLs, and it is as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.chaos import chaos
from tests.distributed.test_saver import CONTEXT


def test_end_is_the_same_when_ranks_are_killed_25_times(tmp_path: Path) -> None:
    found = chaos(CONTEXT, tmp_path, num_kills=25, seed=4, pause_s=0.05, longest_s=6.0)
    assert found.problems == []
    assert sum(found.kills.values()) == 25
    assert len(found.kills) == 3  # one rank, the other, and both
