"""State that was given to `register` on several ranks: rank zero's is saved, and a difference is not silent."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.checkpoint.format.commit import list_checkpoints
from tests.distributed.registering_ranks import run_loop
from tests.distributed.test_saver import ranks


@pytest.mark.parametrize(("is_alike", "is_lenient"), [(True, False), (False, True), (False, False)])
def test_all_ranks_stop_when_registered_states_differ(tmp_path: Path, is_alike: bool, is_lenient: bool) -> None:
    with ranks(2, run_loop, tmp_path, is_alike, is_lenient) as processes:
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    names = [name for name, _ in list_checkpoints(tmp_path / "run" / "checkpoints")]
    if not is_alike and not is_lenient:
        assert codes == [1, 1], said
        assert names == []
        assert all("register('count'): the state of 'count' differs between rank 0 and rank 1" in each for each in said)
        return
    assert codes == [0, 0], said
    assert names == ["epoch-0001"]
    assert ("differs between rank 0 and rank 1" in said[0]) is not is_alike
