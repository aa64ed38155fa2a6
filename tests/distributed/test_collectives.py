"""Work that fails on some ranks fails on all, with the same error class."""

from __future__ import annotations

import json
from pathlib import Path

from tests.distributed.collective_ranks import run_cases
from tests.distributed.test_saver import ranks


def test_error_class_is_the_same_when_some_ranks_fail(tmp_path: Path) -> None:
    cases = [["", ""], ["", "damage"], ["damage", "damage"], ["damage", "disk"], ["memory", "damage"]]
    with ranks(2, run_cases, tmp_path, cases) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    zero, one = (json.loads((tmp_path / f"raised-{rank}").read_text()) for rank in range(2))
    # From the same processes: tensors that DDP cannot send.
    refused = [json.loads((tmp_path / f"refused-{rank}").read_text()) for rank in range(2)]
    assert refused[0] == refused[1]
    assert list(refused[0]) == ["16-bit integers", "unsigned", "8-bit floats", "expanded"]
    assert "task: model(): unusual is of type torch.int16" in refused[0]["16-bit integers"]
    assert "elements of unusual share memory" in refused[0]["expanded"]
    memory = "doing it: MemoryError: no more"
    assert list(zip(zero, one, strict=True)) == [
        (["", ""], ["", ""]),
        (["DamagedError", "rank 1: a digest"], ["DamagedError", "a digest"]),
        (["DamagedError", "a digest"], ["DamagedError", "a digest"]),
        # Another checkpoint helps against damage, but not against a failing disk.
        (["CheckpointError", "rank 1: a disk in trouble"], ["CheckpointError", "a disk in trouble"]),
        (["CheckpointError", memory], ["CheckpointError", f"rank 0: {memory}"]),
    ]
