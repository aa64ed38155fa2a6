"""In the epoch that goes on each sample comes once, whatever kind of loader, on as many ranks or on others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.own_loops import (
    KINDS,
    NUM_SAMPLES,
    evaluate_unevenly,
    fail_twice,
    train_on,
    train_two_models,
)
from tests.distributed.test_saver import ranks


def train(directory: Path, kind: str, world_size: int, *, crashes: bool) -> list[list[int]]:
    """The samples of each epoch that the ranks together had."""
    with ranks(world_size, train_on, directory, kind, crashes) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * world_size
    name = "cut" if crashes else "resumed"
    parts = [json.loads((directory / f"{name}-{rank}.json").read_text()) for rank in range(world_size)]
    return [[index for part in parts for at, indices in part if at == epoch for index in indices] for epoch in range(2)]


@pytest.mark.parametrize("num_ranks", [2, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_comes_once_when_two_ranks_go_on_as(tmp_path: Path, kind: str, num_ranks: int) -> None:
    cut, _ = train(tmp_path, kind, 2, crashes=True)
    resumed, second = train(tmp_path, kind, num_ranks, crashes=False)
    assert len(cut) == 32 if kind != "split" else 16
    assert sorted(cut + resumed) == list(range(NUM_SAMPLES))
    assert sorted(second) == list(range(NUM_SAMPLES))


def test_ranks_stay_in_step_when_one_has_an_evaluation_batch_more(tmp_path: Path) -> None:
    with ranks(2, evaluate_unevenly, tmp_path) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    told = [json.loads((tmp_path / f"evaluated-{rank}.json").read_text()) for rank in range(2)]
    assert [batches for batches, _ in told] == [[3, 3, 3], [2, 2, 2]]
    assert [mean for _, mean in told] == [pytest.approx(9.5), pytest.approx(9.5)]


def test_failure_is_its_own_when_another_run_has_failed_in_the_same_processes(tmp_path: Path) -> None:
    with ranks(2, fail_twice, tmp_path) as processes:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0]
    for rank in range(2):
        first, second = json.loads((tmp_path / f"causes-{rank}.json").read_text())
        assert "the first of rank" in first
        assert "the second of rank" in second


def test_two_models_resume_on_one_rank_when_two_ranks_saved(tmp_path: Path) -> None:
    for world_size, strategy in ((2, "fsdp2"), (1, "single")):
        with ranks(world_size, train_two_models, tmp_path, strategy) as processes:
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0] * world_size
        # So the second attempt resumes from the first epoch.
        shutil.move(tmp_path / "run" / "checkpoints" / "epoch-0002", tmp_path / str(world_size))
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected, found = (load_file(tmp_path / number / name) for number in ("2", "1"))
        assert found.keys() == expected.keys()
        assert any(".critic." in key or key.startswith("critic.") for key in found)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)
    step, metrics = json.loads((tmp_path / "end-1.json").read_text())
    assert step == 2 * NUM_SAMPLES // 4
    assert {"train/lr/generator", "train/lr/critic"} <= set(metrics)
