"""Each file in `examples/` runs as it says, and leaves checkpoints that verify and one finished MLflow run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from harness.checkpoint.format.verify import verify
from tests.launching import BIN, ROOT, harness, run

EXAMPLES = ROOT / "examples"
ON_CPU = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = [BIN / "torchrun", "--nproc_per_node", "2", "--no-python"]


@pytest.mark.parametrize(
    ("words", "run_name"),
    [
        ([BIN / "python", EXAMPLES / "own_loop.py"], "own-loop"),
        (harness("train", "--config", EXAMPLES / "own_task.yaml", "--run_name", "own-task"), "own-task"),
        ([BIN / "python", EXAMPLES / "plain_pytorch.py"], "plain-pytorch"),
        (
            [
                *TORCHRUN,
                *harness("run", "--every_n_epochs", "2", "--run_name", "fsdp2"),
                EXAMPLES / "fsdp2_torchrun.py",
            ],
            "fsdp2",
        ),
        ([BIN / "python", EXAMPLES / "transformers_trainer.py"], "transformers-trainer"),
        ([BIN / "python", EXAMPLES / "lightning_trainer.py"], "lightning-trainer"),
        ([BIN / "python", EXAMPLES / "keras_fit.py"], "keras-fit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_example_leaves_checkpoints_and_a_finished_run(words: list[str | Path], run_name: str, tmp_path: Path) -> None:
    extra = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    if "own_task" in str(words):
        extra["PYTHONPATH"] = f"{ROOT}:{EXAMPLES}"
    done = run(words, tmp_path, timeout_s=240, extra=extra)
    assert done.code == 0, done.output[-4000:]
    checkpoints = sorted((tmp_path / "runs" / run_name / "checkpoints").iterdir())
    assert "epoch-0004" in [path.name for path in checkpoints], done.output
    for checkpoint in checkpoints:
        assert not verify(checkpoint).problems
        assert load_file(checkpoint / "model.safetensors")
    client = MlflowClient(extra["MLFLOW_TRACKING_URI"])
    experiments = [each.experiment_id for each in client.search_experiments()]
    (mlflow_run,) = client.search_runs(experiments)
    assert mlflow_run.info.status == "FINISHED"
    assert "train/loss" in mlflow_run.data.metrics
    models = client.search_logged_models(experiments)
    assert {model.name for model in models} == {path.name for path in checkpoints}


def test_every_example_is_run() -> None:
    text = Path(__file__).read_text()
    tested = set(re.findall(r"EXAMPLES / \"(\w+)\.\w+\"", text))
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested
