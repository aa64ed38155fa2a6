"""A run that goes on as another number of ranks takes the same samples in each step, and comes to the same end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.verify import verify
from tests.distributed.resuming_ranks import NUM_EPOCHS, NUM_SAMPLES, train_some
from tests.distributed.test_saver import ranks

SAMPLES_PER_STEP = 12


def attempt(
    directory: Path, name: str, world_size: int, strategy: str = "ddp", every_n_steps: int | None = None, **task: Any
) -> list[int | None]:
    arguments = (directory, name, {"batch_size": 6, **task}, strategy, every_n_steps)
    with ranks(world_size, train_some, *arguments) as processes:
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]


def samples_of_steps(directory: Path, world_size: int) -> list[list[int]]:
    """The samples that all ranks together had in each optimizer step, sorted."""
    logs = [(directory / f"seen-{rank}.jsonl").read_text().splitlines() for rank in range(world_size)]
    rounds = [[index for line in lines for index in json.loads(line)] for lines in zip(*logs, strict=True)]
    num_rounds = SAMPLES_PER_STEP // len(rounds[0])
    return [
        sorted(index for part in rounds[first : first + num_rounds] for index in part)
        for first in range(0, len(rounds), num_rounds)
    ]


@pytest.mark.parametrize("strategies", [("ddp", "ddp", "ddp"), ("zero2", "zero3", "fsdp2")], ids="-".join)
def test_steps_take_the_same_samples_when_ranks_are_others(tmp_path: Path, strategies: tuple[str, str, str]) -> None:
    first, second, third = strategies
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    assert attempt(tmp_path / "whole", "all", 2) == [0, 0]
    expected = samples_of_steps(tmp_path / "whole" / "all", 2)
    assert len(expected) == NUM_EPOCHS * NUM_SAMPLES // SAMPLES_PER_STEP

    # A signal at one rank alone stops all, in the middle of an epoch.
    assert attempt(tmp_path / "cut", "two", 2, first, signal_at=6, signalled_rank=1) == [75, 75]
    assert attempt(tmp_path / "cut", "one", 1, second, signal_at=6) == [75]
    assert attempt(tmp_path / "cut", "three", 3, third) == [0, 0, 0]
    found: list[list[int]] = []
    for name, world_size in (("two", 2), ("one", 1), ("three", 3)):
        found += samples_of_steps(tmp_path / "cut" / name, world_size)
    assert found == expected

    whole = json.loads((tmp_path / "whole" / "end.json").read_text())
    cut = json.loads((tmp_path / "cut" / "end.json").read_text())
    assert cut["step"] == whole["step"]
    assert cut["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("where", ["evaluation", "save in flight"])
def test_all_ranks_stop_with_a_checkpoint_when_one_gets_a_signal_in_an(tmp_path: Path, where: str) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    if where == "evaluation":
        assert attempt(tmp_path, "one", 2, signal_at_eval=2, signalled_rank=1) == [75, 75]
        # In the first epoch's evaluation, which begins again.
        expected = {"step-00000004": 4}
    else:
        assert attempt(tmp_path, "one", 2, every_n_steps=2, stuck_at=2, signal_at=2, signalled_rank=1) == [75, 75]
        # The one that was stuck was finished before the one that the stop takes.
        expected = {"step-00000002": 2, "step-00000003": 3}
    assert {name: manifest.step for name, manifest in list_checkpoints(checkpoints)} == expected
    assert [problem for name in expected for problem in verify(checkpoints / name).problems] == []
    assert attempt(tmp_path, "two", 2) == [0, 0]
    steps = samples_of_steps(tmp_path / "two", 2)
    assert len(steps) == NUM_EPOCHS * NUM_SAMPLES // SAMPLES_PER_STEP - max(expected.values())
