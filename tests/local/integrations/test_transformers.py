"""`transformers.Trainer` with our callback, on real images, in this process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import harness
from harness.checkpoint.format.commit import list_checkpoints
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.errors import CheckpointError, ConfigError, Stopped
from harness.integrations.transformers import HarnessCallback
from harness.tasks import Digits
from tests.mlflow_reader import client, history, models, only_run

EPOCH_STEPS = 8  # 256 images, 32 at once
IMAGES = Digits()._images(evaluation=False)


class Images(Dataset[Any]):
    """The first images, as sequences of 64 pixels that have one of 17 values each."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = IMAGES[index]
        return {"input_ids": (image * 16).long().flatten(), "labels": label}


class Stream(IterableDataset[Any]):
    """The first 128 images, of which nobody knows how many they are."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(Images(128).__getitem__, range(128))


class At(TrainerCallback):  # type: ignore[misc]
    """Does something at a step."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.act()


def make_trainer(
    *callbacks: TrainerCallback,
    every_n_epochs: int = 1,
    data: Dataset[Any] | None = None,
    width: int = 16,
    **arguments: Any,
) -> Trainer:
    torch.manual_seed(0)
    arguments = {"save_strategy": "no", "eval_strategy": "epoch", "logging_steps": 4, **arguments}
    config = BertConfig(
        vocab_size=17,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        num_labels=10,
    )
    return Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            "out",
            **{"num_train_epochs": 4, "per_device_train_batch_size": 32, "disable_tqdm": True, **arguments},
            use_cpu=True,
        ),
        train_dataset=data or Images(256),
        eval_dataset=Images(64),
        callbacks=[
            HarnessCallback(every_n_epochs, run_name="bert"),
            *callbacks,
        ],
    )


def fail() -> None:
    raise RuntimeError("the disk of this data set fell out")


def test_models_load_and_give_the_same_when_published_each_second_epoch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harness.autolog(every_n_epochs=1)  # the callback turns it off
    trainer = make_trainer(every_n_epochs=2, report_to="mlflow")
    trainer.train()
    assert "harness: autolog:" not in capfd.readouterr().err
    # After the run's end, to which it is added: what the last epoch has given, and two tests.
    trainer.evaluate()
    trainer.evaluate(Images(32), metric_key_prefix="test")
    trainer.predict(Images(16), metric_key_prefix="test_again")

    reader, run = client(tmp_path), only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["args.learning_rate"] == "5e-05"
    assert run.data.params["model.hidden_size"] == "16"
    assert [point.step for point in history(reader, run, "train/loss")] == [4, 8, 12, 16, 20, 24, 28, 32]
    assert [point.step for point in history(reader, run, "eval/loss")] == [8, 16, 24, 32]
    assert [(point.step, point.value) for point in history(reader, run, "epoch")] == [(8, 1), (16, 2), (24, 3), (32, 4)]
    for key in ("test/loss", "test/again_loss"):
        assert [point.step for point in history(reader, run, key)] == [32], key
    assert not any(tag.startswith("harness.attempt.2") for tag in run.data.tags)
    assert [model.tags["step"] for model in models(reader, run)] == ["16", "32"]
    found = models(reader, run)[-1]
    of_model = {metric.key: (metric.step, metric.value) for metric in found.metrics or []}
    last = history(reader, run, "eval/loss")[-1]
    assert of_model["eval/loss"] == (32, last.value)  # the evaluation of this very epoch

    images = torch.stack([Images(64)[index]["input_ids"] for index in range(64)])
    directory = mlflow.artifacts.download_artifacts(f"models:/{found.model_id}")
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=images).logits
        for loaded in (
            harness.load_model(f"models:/{found.model_id}"),
            AutoModelForSequenceClassification.from_pretrained(directory),
        ):
            assert type(loaded) is BertForSequenceClassification
            assert torch.equal(loaded(input_ids=images).logits, expected)
    moments = load_file("runs/bert/checkpoints/epoch-0004/optimizer.safetensors")
    state = trainer.optimizer.optimizer.state
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(moments[f"exp_avg.{name}"], state[parameter]["exp_avg"]), name


def test_run_goes_on_with_no_point_twice_when_trainer_resumes_behind_it(tmp_path: Path) -> None:
    # Both save at steps 8, 16 and 24. It fails at 26, when our second is written: the third has waited for it.
    with pytest.raises(RuntimeError, match="fell out"):
        make_trainer(At(26, fail), save_strategy="epoch").train()
    first = dict(list_checkpoints(tmp_path / "runs/bert/checkpoints"))
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint="out/checkpoint-8")

    reader, run = client(tmp_path), only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["harness.attempt.1.reason"] == "training was abandoned: another one began in the same process"
    assert run.data.tags["harness.attempt.2.step_from"] == "8"
    for key, steps in (("train/loss", range(4, 33, 4)), ("eval/loss", range(8, 33, 8)), ("epoch", range(8, 33, 8))):
        assert [point.step for point in history(reader, run, key)] == list(steps), key
    checkpoints = dict(list_checkpoints(tmp_path / "runs/bert/checkpoints"))
    assert list(checkpoints) == ["epoch-0001", "epoch-0002", "epoch-0003", "epoch-0004"]
    assert checkpoints["epoch-0002"] == first["epoch-0002"]  # what was there stays
    assert [model.tags["step"] for model in models(reader, run)] == ["8", "16", "24", "32"]
    weights = load_file("runs/bert/checkpoints/epoch-0004/model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(weights[name], parameter), name


def test_trainer_saves_and_ends_with_75_when_a_signal_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        make_trainer(At(10, lambda: os.kill(os.getpid(), signal.SIGUSR1))).train()
    assert stopped.value.code == 75
    assert only_run(tmp_path).info.status == "KILLED"
    ((name, manifest),) = list_checkpoints(tmp_path / "runs/bert/checkpoints")[1:]
    assert name == f"step-{manifest.step:08d}" and manifest.step in (11, 12)
    assert (tmp_path / "out" / f"checkpoint-{manifest.step}").is_dir()

    with pytest.raises(CheckpointError, match=r"has checkpoints already .* training begins at step 0; have the loop"):
        make_trainer().train()
    make_trainer().train(resume_from_checkpoint=True)
    run = only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.tags["harness.attempt.3.step_from"] == str(manifest.step)
    assert list_checkpoints(tmp_path / "runs/bert/checkpoints")[-1][1].step == 4 * EPOCH_STEPS


def found_checkpoints() -> list[tuple[str, int, int]]:
    found = list_checkpoints(Path("runs/bert/checkpoints"))
    return [(name, manifest.epoch, manifest.step) for name, manifest in found]


def test_each_pass_is_an_epoch_when_the_data_have_no_length(tmp_path: Path) -> None:
    arguments = {"data": Stream(), "max_steps": 14, "save_strategy": "epoch", "eval_strategy": "no"}
    with pytest.raises(RuntimeError, match="fell out"):
        make_trainer(At(10, fail), **arguments).train()
    # It passes over 8 steps as if they were all of a first epoch, in which there is no batch.
    make_trainer(**arguments).train(resume_from_checkpoint="out/checkpoint-8")
    passes = [("epoch-0001", 1, 4), ("epoch-0002", 2, 8), ("epoch-0003", 3, 12)]
    assert found_checkpoints() == [*passes, ("step-00000014", 3, 14)]
    points = history(client(tmp_path), only_run(tmp_path), "epoch")
    assert [(point.step, point.value) for point in points] == [(4, 1), (8, 2), (12, 3)]


def test_the_last_pass_is_whole_when_max_steps_ends_with_it(tmp_path: Path) -> None:
    make_trainer(data=Stream(), max_steps=4, gradient_accumulation_steps=2, eval_strategy="no").train()
    assert found_checkpoints() == [("epoch-0001", 1, 2), ("epoch-0002", 2, 4)]


def test_learning_rate_is_the_epochs_own_when_its_evaluation_moves_it(tmp_path: Path) -> None:
    plateau = {"factor": 0.5, "patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    make_trainer(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs=plateau, learning_rate=0.5).train()
    found = list_checkpoints(tmp_path / "runs/bert/checkpoints")
    assert [manifest.metrics["train/lr"] for _, manifest in found] == [0.5, 0.5, 0.25, 0.125]


class Weights(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights as each epoch's evaluation has left them."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, torch.Tensor]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        named = parts["model"].state_dict()
        self.by_step[state.global_step] = {name: tensor.clone() for name, tensor in named.items()}


@pytest.mark.parametrize("cadence", ["epoch", "step"])
def test_last_checkpoint_is_the_last_step_when_best_weights_are_loaded(tmp_path: Path, cadence: str) -> None:
    kept = Weights()
    # Wide, so that the copy takes longer than it takes the Trainer to load its best weights.
    trainer = make_trainer(
        kept,
        width=512,
        data=Images(8),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=1e-3,
        save_strategy="epoch",
        save_only_model=True,
        load_best_model_at_end=True,
    )
    by_step = CheckpointConfig(every_n_steps=2, save_last=False, when_busy="wait")
    every_n_epochs, checkpoint = (1, None) if cadence == "epoch" else (None, by_step)
    tracking = TrackingConfig(enabled=False)
    trainer.remove_callback(HarnessCallback)
    trainer.add_callback(HarnessCallback(every_n_epochs, run_name="bert", checkpoint=checkpoint, tracking=tracking))
    trainer.train()
    found = list_checkpoints(tmp_path / "runs/bert/checkpoints")
    assert [manifest.step for _, manifest in found] == [2, 4]
    assert trainer.state.best_global_step == 2
    for name, manifest in found:
        saved = load_file(tmp_path / "runs/bert/checkpoints" / name / "model.safetensors")
        wrong = [key for key in saved if not torch.equal(saved[key], kept.by_step[manifest.step][key])]
        assert wrong == [], name


TINY = BertConfig(vocab_size=17, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)


def write_model(directory: Path, architecture: str) -> None:
    """Write a model that names its architecture, as the callback publishes it, in a directory."""
    directory.mkdir()
    recipe = {
        "class_path": "harness.integrations.transformers.Pretrained",
        "init_args": {"architecture": architecture, "config": TINY.to_dict()},
    }
    (directory / "MLmodel").write_text(yaml.safe_dump({"flavors": {"harness": recipe}}))
    state = BertForSequenceClassification(TINY).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")


def test_architecture_is_not_imported_when_its_code_comes_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", "evil_architecture.X")
    (tmp_path / "model/evil_architecture.py").write_text("import pathlib\npathlib.Path('imported').touch()\n")
    monkeypatch.chdir(tmp_path / "model")
    monkeypatch.syspath_prepend(str(tmp_path / "model"))
    with pytest.raises(
        ConfigError, match=r"architecture: names evil_architecture\.X, which is not below torch\.nn, tr"
    ):
        harness.load_model(".")
    with pytest.raises(ConfigError, match=r"names evil_architecture\.X, which is in the model's own directory"):
        harness.load_model(".", trusted=["evil_architecture"])
    assert not Path("imported").exists()


def test_architecture_of_another_package_is_built_when_the_caller_trusts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_architecture.py").write_text(
        "from transformers import BertForSequenceClassification\nclass Own(BertForSequenceClassification): ..."
    )
    write_model(tmp_path / "model", "own_architecture.Own")
    with pytest.raises(ConfigError, match=r"is not below torch\.nn, transformers; if you trust it"):
        harness.load_model("model")
    assert type(harness.load_model("model", trusted=["own_architecture"])).__name__ == "Own"
    write_model(tmp_path / "config", "transformers.BertConfig")
    with pytest.raises(ConfigError, match=r"transformers\.BertConfig is not"):
        harness.load_model("config")
    write_model(tmp_path / "short", "transformers.BertForSequenceClassification")
    assert type(harness.load_model("short")) is BertForSequenceClassification
