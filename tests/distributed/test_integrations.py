"""Other people's trainers on two ranks, under each strategy that they have."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import list_checkpoints
from tests.launching import BIN, ROOT, accelerate, run
from tests.mlflow_reader import all_runs, client, history, models, only_run

pytestmark = pytest.mark.usefixtures("empty_database")

HERE = ROOT / "tests" / "distributed"


def check_runs(cwd: Path, strategies: tuple[str, ...], steps: list[int], keys: dict[str, list[int]]) -> None:
    """Each strategy's run in MLflow: its models by step, and where its metrics have points."""
    reader = client(cwd)
    found = {run.info.run_name: run for run in all_runs(reader)}
    assert set(found) == set(strategies)
    for name, mlflow_run in found.items():
        assert mlflow_run.info.status == "FINISHED", name
        assert mlflow_run.data.tags["harness.strategy"] == name
        assert mlflow_run.data.tags["harness.world_size"] == "2"
        assert [int(model.tags["step"]) for model in models(reader, mlflow_run)] == steps
        for key, expected in keys.items():
            assert [point.step for point in history(reader, mlflow_run, key)] == expected, (name, key)


TRANSFORMERS = HERE / "trainer_of_transformers.py"


@pytest.mark.parametrize(
    ("strategies", "launch"),
    [
        (("ddp", "fsdp2", "fsdp1"), accelerate("fsdp2", TRANSFORMERS, "train")),
        # As DeepSpeed's users start it: the strategy is in the Trainer's arguments, and the launcher knows of none.
        (("zero2", "zero3"), [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", TRANSFORMERS, "zero"]),
    ],
    ids=["ddp-fsdp", "zero"],
)
def test_checkpoints_are_what_the_trainer_had_when_transformers_trains_on_two_ranks(
    tmp_path: Path, strategies: tuple[str, ...], launch: list[str | Path]
) -> None:
    done = run(launch, tmp_path, timeout_s=280)
    assert done.code == 0, done.output
    keys = {"train/loss": [3, 6, 9, 12, 15], "eval/loss": [4, 8, 12, 16], "epoch": [4, 8, 12, 16]}
    check_runs(tmp_path, strategies, [8, 16], keys)
    for name in strategies:
        checkpoints = tmp_path / "runs" / name / "checkpoints"
        assert [each for each, _ in list_checkpoints(checkpoints)] == ["epoch-0002", "epoch-0004"]
        for epoch in (2, 4):
            expected = torch.load(tmp_path / f"{name}-{epoch}.pt")
            weights = load_file(checkpoints / f"epoch-{epoch:04d}" / "model.safetensors")
            assert weights.keys() | {"lm_head.weight"} == expected.keys()  # tied: once
            for key, tensor in weights.items():
                assert torch.equal(tensor, expected[key]), (name, epoch, key)


def test_all_ranks_stop_with_the_reason_when_one_fails_under_transformers(tmp_path: Path) -> None:
    done = run(accelerate("fsdp2", TRANSFORMERS, "fail"), tmp_path, timeout_s=150)
    assert done.code == 1
    assert "rank 1 failed: RuntimeError: the disk of this rank fell out" in done.output
    mlflow_run = only_run(tmp_path, wait_for_end_s=30)
    assert mlflow_run.info.status == "FAILED"
    assert mlflow_run.data.tags["harness.end_reason"] == "rank 1 failed: RuntimeError: the disk of this rank fell out"


def test_checkpoints_are_what_the_trainer_had_when_lightning_trains_on_two_ranks(tmp_path: Path) -> None:
    done = run([sys.executable, HERE / "trainer_of_lightning.py"], tmp_path, timeout_s=200)
    assert done.code == 0, done.output
    # 125 images for each rank, 32 at once, two batches to a step.
    keys = {"train/loss_epoch": [2, 4, 6, 8], "eval/loss": [2, 4, 6, 8], "epoch": [2, 4, 6, 8]}
    strategies = ("ddp", "fsdp2", "fsdp1", "zero2", "zero3")
    check_runs(tmp_path, strategies, [4, 8], keys)
    for name in strategies:
        expected = torch.load(tmp_path / f"{name}.pt")
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "epoch-0004"
        weights = load_file(checkpoint / "model.safetensors")
        assert weights.keys() == expected.keys()
        for key, tensor in weights.items():
            assert torch.equal(tensor, expected[key]), (name, key)
        moments = load_file(checkpoint / "optimizer.safetensors")
        assert moments["exp_avg.net.0.weight"].shape == weights["net.0.weight"].shape


def test_all_ranks_have_one_run_that_has_failed_when_one_of_them_raises(tmp_path: Path) -> None:
    done = run(accelerate("ddp", HERE / "tracked_ranks.py"), tmp_path, extra={"ACCELERATE_USE_CPU": "true"})
    assert done.code == 1
    found = only_run(tmp_path, wait_for_end_s=30)
    assert found.info.status == "FAILED"
    assert found.data.tags["harness.end_reason"] == "RuntimeError: fell out"
    assert found.data.tags["harness.world_size"] == "2"
    assert [(point.step, point.value) for point in history(client(tmp_path), found, "rank")] == [(0, 0), (1, 0), (2, 0)]
