"""Several trainings in the ranks of one job: all ranks tell them apart alike."""

from __future__ import annotations

import json
from pathlib import Path

from harness.checkpoint.format.commit import list_checkpoints
from tests.autologged.folds import train_folds
from tests.distributed.test_saver import ranks


def test_ranks_agree_on_trainings_and_their_states_when_memory_is_out_and_the_script_is_run_again(
    tmp_path: Path,
) -> None:
    with ranks(2, train_folds, tmp_path) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    runs = {path.name: list_checkpoints(path / "checkpoints") for path in (tmp_path / "runs").iterdir()}
    steps = {name: [manifest.step for _, manifest in found] for name, found in runs.items()}
    assert steps == {"x": [4, 8, 12], "x-2": [], "x-3": [5, 10, 15]}
    names = [f"checkpoint_{number}" for number in range(3)]
    for rank in range(2):
        assert json.loads((tmp_path / f"saved-{rank}.json").read_text()) == [names[:2], names]
