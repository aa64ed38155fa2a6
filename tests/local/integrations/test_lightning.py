"""`lightning.pytorch.Trainer` with our callback, on real images, in this process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from safetensors.torch import load_file

import harness
from harness.checkpoint.format.commit import list_checkpoints
from harness.errors import Stopped
from harness.integrations.lightning import HarnessCallback
from harness.tasks import Digits
from harness.tracking.journal.entries import read_entries
from tests.local.integrations.digits_module import DigitsModule
from tests.mlflow_reader import client, history, models, only_run

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command is available"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:..fit.ckpt_path=None.. was called without a model"),
    pytest.mark.filterwarnings("ignore:.fit.ckpt_path=.last.. is set, but there is no last"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def make_trainer(*callbacks: Callback, every_n_epochs: int = 1, **arguments: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    options = {"max_epochs": 4, "accelerator": "cpu", "devices": 1, "logger": False, "log_every_n_steps": 4}
    return pl.Trainer(
        **options | {"enable_progress_bar": False, "enable_model_summary": False} | arguments,  # type: ignore[arg-type]
        callbacks=[
            HarnessCallback(every_n_epochs, run_name="digits"),
            *callbacks,
        ],
    )


def test_models_load_and_give_the_same_when_published_each_second_epoch(tmp_path: Path) -> None:
    module = DigitsModule(width=6)
    make_trainer(every_n_epochs=2, enable_checkpointing=False).fit(module)

    reader, run = client(tmp_path), only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["module.width"] == "6"
    assert [point.step for point in history(reader, run, "train/loss_step")] == list(range(4, 33, 4))
    assert [point.step for point in history(reader, run, "train/loss_epoch")] == [8, 16, 24, 32]
    assert [point.step for point in history(reader, run, "eval/loss")] == [8, 16, 24, 32]
    assert [(point.step, point.value) for point in history(reader, run, "epoch")] == [(8, 1), (16, 2), (24, 3), (32, 4)]
    found = models(reader, run)
    assert [model.tags["step"] for model in found] == ["16", "32"]
    of_model = {metric.key: (metric.step, metric.value) for metric in found[-1].metrics or []}
    for key in ("eval/loss", "train/loss_epoch"):  # of this very epoch
        last = history(reader, run, key)[-1]
        assert of_model[key] == (32, last.value)

    images = Digits()._images(evaluation=True).tensors[0]
    loaded = harness.load_model(f"models:/{found[-1].model_id}")
    assert type(loaded) is DigitsModule
    with torch.no_grad():
        assert torch.equal(loaded(images), module.eval()(images))
    moments = load_file("runs/digits/checkpoints/epoch-0004/optimizer.safetensors")
    state = module.trainer.optimizers[0].state
    for name, parameter in module.named_parameters():
        assert torch.equal(moments[f"exp_avg.{name}"], state[parameter]["exp_avg"]), name


def test_run_goes_on_with_no_point_twice_when_trainer_resumes_behind_it(tmp_path: Path) -> None:
    # Lightning saves at step 16, we at 8, 16 and 24; it fails at 29.
    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "own", every_n_epochs=2, save_top_k=-1, filename="{step}")

    with pytest.raises(RuntimeError, match="fell out"):
        make_trainer(keep()).fit(DigitsModule(fails_at=29))
    failed = only_run(tmp_path)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["harness.end_reason"] == "RuntimeError: the disk of this data set fell out"
    first = dict(list_checkpoints(tmp_path / "runs/digits/checkpoints"))
    assert list(first) == ["epoch-0001", "epoch-0002", "epoch-0003"]

    module = DigitsModule()
    make_trainer(keep()).fit(module, ckpt_path=tmp_path / "own" / "step=16.ckpt")
    reader, run = client(tmp_path), only_run(tmp_path)
    assert (run.info.status, run.info.run_id) == ("FINISHED", failed.info.run_id)
    assert run.data.tags["harness.attempt.2.step_from"] == "16"
    for key, steps in (
        ("train/loss_step", range(4, 33, 4)),
        ("eval/loss", range(8, 33, 8)),
        ("epoch", range(8, 33, 8)),
    ):
        assert [point.step for point in history(reader, run, key)] == list(steps), key
    checkpoints = dict(list_checkpoints(tmp_path / "runs/digits/checkpoints"))
    assert list(checkpoints) == [*first, "epoch-0004"]
    assert checkpoints["epoch-0003"] == first["epoch-0003"]  # what was there stays
    assert [model.tags["step"] for model in models(reader, run)] == ["8", "16", "24", "32"]


class DigitsWithTest(DigitsModule):
    """Has a test, too."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.training_loss(batch))
        self.log("test/number", float(batch_idx), on_step=True, on_epoch=False)

    def training_loss(self, batch: Any) -> torch.Tensor:
        images, labels = batch
        return torch.nn.functional.cross_entropy(self(images), labels)

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def test_metrics_of_a_test_are_in_the_run_when_it_comes_after_training(tmp_path: Path) -> None:
    module = DigitsWithTest()
    trainer = make_trainer(max_epochs=1, enable_checkpointing=False)
    trainer.fit(module)
    (tested,) = trainer.test(module, verbose=False)
    reader, run = client(tmp_path), only_run(tmp_path)
    assert run.info.status == "FINISHED"
    (point,) = history(reader, run, "test/loss")
    assert (point.step, point.value) == (8, pytest.approx(tested["test/loss"]))
    assert [point.step for point in history(reader, run, "eval/loss")] == [8]
    # Together, once for the test and not for each of its batches.
    assert [point.step for point in history(reader, run, "test/number")] == [8]
    assert len(list(read_entries(tmp_path / "runs/digits/outbox", kinds=("end",)))) == 2


def test_a_line_says_so_when_a_test_belongs_to_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(enable_checkpointing=False).test(DigitsWithTest(), verbose=False)
    assert "test/loss, test/number are in no run" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


class Halving(DigitsModule):
    """Halves its learning rate with each epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def test_learning_rate_is_the_epochs_own_when_its_end_moves_it(tmp_path: Path) -> None:
    make_trainer(max_epochs=3, enable_checkpointing=False).fit(Halving())
    found = list_checkpoints(tmp_path / "runs/digits/checkpoints")
    assert [manifest.metrics["train/lr"] for _, manifest in found] == [0.5, 0.25, 0.125]


class Skipping(DigitsModule):
    """Leaves out the rest of an epoch after two batches."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 2 else None


def test_epochs_count_as_lightning_counts_them_when_batches_are_left_out(tmp_path: Path) -> None:
    trainer = make_trainer(max_epochs=-1, max_steps=5, enable_checkpointing=False)
    trainer.fit(Skipping())
    found = list_checkpoints(tmp_path / "runs/digits/checkpoints")
    assert [(name, manifest.epoch, manifest.step) for name, manifest in found] == [
        ("epoch-0001", 1, 2),
        ("epoch-0002", 2, 4),
        ("step-00000005", 2, 5),
    ]


class StopAt(Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 10:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_trainer_ends_with_75_when_a_signal_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        make_trainer(StopAt(), OnExceptionCheckpoint(tmp_path / "own"), enable_checkpointing=True).fit(DigitsModule())
    assert stopped.value.code == 75
    assert only_run(tmp_path).info.status == "KILLED"
    name, manifest = list_checkpoints(tmp_path / "runs/digits/checkpoints")[-1]
    assert name == f"step-{manifest.step:08d}" and manifest.step in (11, 12)
    # Lightning's own, by a callback of its own, to go on from.
    assert torch.load(tmp_path / "own" / "on_exception.ckpt", weights_only=False)["global_step"] == manifest.step


def test_row_and_models_arrive_when_mlflow_refuses_one_name_of_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Named(DigitsModule):
        def validation_step(self, *args: Any) -> Any:
            self.log("val/AR@100", 0.5)
            return super().validation_step(*args)

    make_trainer(max_epochs=2, enable_checkpointing=False).fit(Named(width=6))
    reader, run = client(tmp_path), only_run(tmp_path)
    assert [len(history(reader, run, key)) for key in ("eval/loss", "val/AR_100-0f5bccb8")] == [2, 2]
    found = models(reader, run)
    assert len(found) == 2
    assert all({metric.key for metric in model.metrics or []} >= {"val/AR_100-0f5bccb8"} for model in found)
    said = capfd.readouterr().err
    assert said.count("metric 'val/AR@100' is named 'val/AR_100-0f5bccb8' in MLflow") == 1
    assert "refused" not in said
