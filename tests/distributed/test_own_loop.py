"""PeriodicLogger in a loop that is not ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from harness.checkpoint.format.commit import list_checkpoints
from harness.diagnostics.report import checkpoint_records
from harness.tasks import Digits
from tests.launching import BIN, ROOT, run
from tests.mlflow_reader import client, history, models, only_run

pytestmark = pytest.mark.usefixtures("empty_database")

LAUNCH = (BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
SCRIPT = ROOT / "tests" / "distributed" / "own_loop.py"
ON_CPUS = {"ACCELERATE_USE_CPU": "true"}


def test_checkpoints_metrics_and_mlflow_agree_when_logger_is_in_own_loop(tmp_path: Path) -> None:
    words = (*LAUNCH, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", SCRIPT, "mine")
    done = run(words, tmp_path, extra=ON_CPUS)
    assert done.code == 0, done.output

    checkpoints = dict(list_checkpoints(tmp_path / "runs" / "mine" / "checkpoints"))
    # 1,437 images: 22 batches of 2 x 32, two to an optimizer step.
    assert [(n, m.epoch, m.step) for n, m in checkpoints.items()] == [("epoch-0002", 2, 22), ("epoch-0004", 4, 44)]
    Digits().model().load_state_dict(load_file(tmp_path / "runs/mine/checkpoints/epoch-0004/model.safetensors"))

    reader, mlflow_run = client(tmp_path), only_run(tmp_path)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.params == {"lr": "0.002"}
    assert mlflow_run.data.tags["team"] == "vision"
    assert mlflow_run.data.tags["harness.strategy"] == "ddp"
    assert mlflow_run.data.tags["harness.world_size"] == "2"
    accuracy = history(reader, mlflow_run, "eval/accuracy")
    assert [point.step for point in accuracy] == [11, 22, 33, 44]
    assert accuracy[-1].value == checkpoints["epoch-0004"].metrics["eval/accuracy"]
    # One point each 5 steps, and the rest of each epoch.
    assert [p.step for p in history(reader, mlflow_run, "train/loss")] == [
        5,
        10,
        11,
        15,
        20,
        22,
        25,
        30,
        33,
        35,
        40,
        44,
    ]
    found = models(reader, mlflow_run)
    assert [model.model_id for model in found] == [
        record["mlflow_model_id"] for record in checkpoint_records(tmp_path / "runs" / "mine")
    ]
    assert [{m.key: m.value for m in model.metrics or []}["eval/accuracy"] for model in found] == [
        manifest.metrics["eval/accuracy"] for manifest in checkpoints.values()
    ]


def test_logger_refuses_when_accelerate_runs_ddp_instead_of_fsdp(tmp_path: Path) -> None:
    words = (BIN / "accelerate", "launch", "--config_file", ROOT / "configs/accelerate/fsdp2.yaml")
    done = run((*words, "--main_process_port", "0", SCRIPT, "mine"), tmp_path, extra=ON_CPUS)
    assert done.code != 0
    assert "FSDP was requested, but accelerate would run MULTI_CPU" in done.output
