"""The loop and the periodic logger in one process: steps, accumulation, limits, stopping, position."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from harness.checkpoint.format.commit import list_checkpoints
from harness.config.schema import CheckpointConfig, EarlyStopping, TrackingConfig, TrainerConfig
from harness.config.task import StepOutput
from harness.distributed.strategies import start
from harness.errors import ConfigError, NonFiniteLossError
from harness.tracking.journal.entries import Entry, read_entries
from harness.training.fit import fit
from harness.training.periodic_logger import PeriodicLogger

NUM_SAMPLES = 20


class Line:
    """Fits a line; keeps which samples it saw."""

    def __init__(self, batch_size: int = 4, eval_losses: list[float] | None = None) -> None:
        self.batch_size = batch_size
        self.eval_losses = eval_losses
        self.seen: list[list[int]] = []

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(1, 1)

    def train_data(self) -> DataLoader[Any]:
        index = torch.arange(float(NUM_SAMPLES)).unsqueeze(1)
        return DataLoader(TensorDataset(index, 3 * index / NUM_SAMPLES), self.batch_size, shuffle=True)

    def eval_data(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(3, 1), torch.ones(3, 1)), 2)

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        index, target = batch
        if model.training:
            self.seen.append(index.flatten().int().tolist())
        loss = F.mse_loss(model(index / NUM_SAMPLES), target)
        if not model.training and self.eval_losses is not None:
            loss = torch.tensor(self.eval_losses[0])
        return StepOutput(loss, weight=len(index))


Run = tuple[Line, PeriodicLogger, nn.Module]


@pytest.fixture
def train(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Trains a line with a configuration; each call is a run of its own."""
    names = iter("abcdefgh")

    def run(
        config: TrainerConfig, task: Line | None = None, tracking: Mapping[str, Any] | None = None, **checkpoint: Any
    ) -> Run:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        task = task or Line()
        accelerator: Accelerator = start(config, seed=3)
        model = task.model()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.05)
        model, optimizer, loader, eval_loader = accelerator.prepare(
            model, optimizer, task.train_data(), task.eval_data()
        )
        checkpoint.setdefault("every_n_epochs", None)
        with PeriodicLogger(
            accelerator,
            checkpoint["every_n_epochs"],
            run_name=next(names),
            run_dir=tmp_path,
            checkpoint=CheckpointConfig(**checkpoint),
            tracking=TrackingConfig(**{"enabled": False, "log_every_n_steps": 2, **(tracking or {})}),
        ) as logger:
            logger.watch(model, optimizer)
            fit(accelerator, task, config, logger, model, optimizer, None, loader, eval_loader)
        return task, logger, copy.deepcopy(model)

    yield run
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def checkpoint_names(logger: PeriodicLogger) -> list[str]:
    assert logger.run_path is not None
    return [name for name, _ in list_checkpoints(logger.run_path / "checkpoints")]


def test_weights_equal_larger_batches_when_gradients_are_accumulated(train: Callable[..., Run]) -> None:
    _, whole, expected = train(TrainerConfig(max_epochs=2), Line(batch_size=10))
    _, split, model = train(TrainerConfig(max_epochs=2, gradient_accumulation_steps=2), Line(batch_size=5))
    assert whole.step == split.step == 4
    torch.testing.assert_close(dict(model.named_parameters()), dict(expected.named_parameters()))


def test_open_accumulation_is_stepped_when_the_limit_ends_the_epoch(train: Callable[..., Run]) -> None:
    task, logger, _ = train(TrainerConfig(max_epochs=2, gradient_accumulation_steps=2, limit_train_batches=3))
    assert len(task.seen) == 6
    assert logger.step == 4  # two whole, and the rest of each epoch


def test_training_ends_and_is_saved_when_max_steps_is_reached_within_an_epoch(train: Callable[..., Run]) -> None:
    task, logger, _ = train(TrainerConfig(max_epochs=9, max_steps=7))
    # In the second epoch: one is complete, and the name says so.
    assert (len(task.seen), logger.step, logger.epoch) == (7, 7, 1)
    assert logger._state.data.batches_done == 2
    assert checkpoint_names(logger) == ["step-00000007"]


def test_epoch_is_complete_when_max_steps_is_reached_at_its_end(train: Callable[..., Run]) -> None:
    _, logger, _ = train(TrainerConfig(max_epochs=9, max_steps=10))
    assert (logger.epoch, checkpoint_names(logger)) == (2, ["epoch-0002"])


def test_checkpoints_follow_both_cadences_when_both_are_set(train: Callable[..., Run]) -> None:
    _, logger, _ = train(TrainerConfig(max_epochs=4), every_n_epochs=2, every_n_steps=4, when_busy="wait")
    # Five steps an epoch. Step 20 is the fourth epoch's end: one checkpoint, with that epoch's evaluation.
    assert checkpoint_names(logger) == [
        *("step-00000004", "step-00000008", "epoch-0002", "step-00000012", "step-00000016", "epoch-0004")
    ]
    assert logger.run_path is not None
    last = list_checkpoints(logger.run_path / "checkpoints")[-1][1]
    assert last.metrics["eval/loss"] == logger.latest["eval/loss"]


def test_training_stops_when_the_monitored_metric_gets_no_better(train: Callable[..., Run]) -> None:
    stopping = EarlyStopping(monitor="eval/loss", mode="min", patience=2)
    _, logger, _ = train(TrainerConfig(max_epochs=9, early_stopping=stopping), Line(eval_losses=[1.0]))
    assert logger.epoch == 3  # one that is the best, two that are no better


def test_no_checkpoint_is_taken_when_the_loss_of_its_window_is_nan(train: Callable[..., Run], tmp_path: Path) -> None:
    class Breaks(Line):
        def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
            output = super().step(model, batch)
            is_last_batch = model.training and len(self.seen) == 5
            return StepOutput(output.loss * float("nan"), output.weight) if is_last_batch else output

    with pytest.raises(NonFiniteLossError, match="train/loss: must be finite, is nan in the steps up to 5"):
        train(TrainerConfig(max_epochs=1), Breaks(), every_n_epochs=1)
    assert list(tmp_path.glob("*/checkpoints/*")) == []


def test_last_checkpoint_is_there_when_the_one_before_keeps_the_disk_busy(
    train: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    _, logger, _ = train(TrainerConfig(max_epochs=6), every_n_epochs=1, when_busy="skip")
    assert checkpoint_names(logger)[-1] == "epoch-0006"
    skipped = 6 - len(checkpoint_names(logger))
    assert logger.latest.get("checkpoint/num_skipped", 0) == skipped
    # A line for the first that is skipped, the second, the fourth.
    assert capfd.readouterr().err.count("skipped one") == skipped.bit_length()


def test_metric_is_renamed_when_mlflow_would_refuse_its_name(
    train: Callable[..., Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Odd(Line):
        def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
            output = super().step(model, batch)
            return StepOutput(output.loss, output.weight, {"acc@1": 1.0})

    _, logger, _ = train(TrainerConfig(max_epochs=1), Odd(), every_n_epochs=1, monitor="train/acc@1", mode="max")
    assert logger.run_path is not None
    entries = list(read_entries(logger.run_path / "outbox"))
    logged = [
        entry.body for entry in entries if entry.kind == "metrics" and "train/acc_1-890dad8a" in entry.body["values"]
    ]
    assert {body["values"]["train/acc_1-890dad8a"] for body in logged} == {1.0}
    # The loop, the checkpoints and what ranks them know the name that was given.
    ((_, manifest),) = list_checkpoints(logger.run_path / "checkpoints")
    assert logger.latest["train/acc@1"] == manifest.metrics["train/acc@1"] == 1.0
    (checkpoint,) = [entry.body for entry in entries if entry.kind == "checkpoint"]
    linked = [(key, value, step) for key, value, _, step in checkpoint["metrics"]]
    assert ("train/acc_1-890dad8a", 1.0, logged[-1]["step"]) in linked
    assert capfd.readouterr().err.count("metric 'train/acc@1' is named 'train/acc_1-890dad8a' in MLflow") == 1


def test_error_names_the_metrics_when_the_monitored_one_is_not_there(train: Callable[..., Run]) -> None:
    stopping = EarlyStopping(monitor="eval/f1")
    with pytest.raises(ConfigError, match="there is no metric 'eval/f1'; there are eval/loss"):
        train(TrainerConfig(max_epochs=9, early_stopping=stopping))


def test_order_is_new_each_epoch_and_the_same_each_run(train: Callable[..., Run]) -> None:
    first, _, _ = train(TrainerConfig(max_epochs=2))
    second, _, _ = train(TrainerConfig(max_epochs=2))
    assert first.seen == second.seen
    assert first.seen[:5] != first.seen[5:]
    assert sorted(index for batch in first.seen[:5] for index in batch) == list(range(NUM_SAMPLES))


def logged_steps(logger: PeriodicLogger, key: str) -> list[int]:
    assert logger.run_path is not None
    entries = read_entries(logger.run_path / "outbox")
    return [entry.body["step"] for entry in entries if entry.kind == "metrics" and key in entry.body["values"]]


@pytest.mark.parametrize(
    ("tracking", "checkpoint", "train_steps", "eval_steps"),
    [
        ({"log_every_n_steps": None}, {}, [5, 10, 15, 20, 25], [5, 10, 15, 20, 25]),
        # The last epoch is logged in any case.
        ({"log_every_n_steps": None, "log_every_n_epochs": 2}, {}, [10, 20, 25], [10, 20, 25]),
        ({"log_every_n_steps": 4, "log_every_n_epochs": 3}, {}, [4, 8, 12, 15, 16, 20, 24, 25], [15, 25]),
        # What a checkpoint holds is logged: the evaluation that there was before it, or at it.
        ({"log_every_n_steps": None, "log_every_n_epochs": 4}, {"every_n_epochs": 3}, [15, 20, 25], [15, 20, 25]),
        ({"log_every_n_steps": None, "log_every_n_epochs": 4}, {"every_n_steps": 12}, [12, 20, 24, 25], [10, 20, 25]),
    ],
)
def test_epochs_and_steps_are_logged_as_often_as_asked_for(
    train: Callable[..., Run],
    tracking: dict[str, Any],
    checkpoint: dict[str, Any],
    train_steps: list[int],
    eval_steps: list[int],
) -> None:
    _, logger, _ = train(TrainerConfig(max_epochs=5), tracking=tracking, when_busy="wait", **checkpoint)
    assert logged_steps(logger, "train/loss") == train_steps
    assert logged_steps(logger, "eval/loss") == eval_steps
    assert logged_steps(logger, "train/grad_norm") == train_steps
    assert logged_steps(logger, "epoch") == [step for step in train_steps if step % 5 == 0 and step in eval_steps]


def test_means_are_over_all_epochs_since_when_not_each_is_logged(train: Callable[..., Run]) -> None:
    def losses(**tracking: Any) -> list[float]:
        _, logger, _ = train(TrainerConfig(max_epochs=2), tracking={"log_every_n_steps": None, **tracking})
        assert logger.run_path is not None
        entries = read_entries(logger.run_path / "outbox")
        return [
            entry.body["values"]["train/loss"]
            for entry in entries
            if entry.kind == "metrics" and "train/loss" in entry.body["values"]
        ]

    (both,), (first, second) = losses(log_every_n_epochs=2), losses()
    assert both == pytest.approx((first + second) / 2, rel=1e-6)


def test_points_are_where_steps_and_epochs_end_when_logged(train: Callable[..., Run]) -> None:
    _, logger, _ = train(TrainerConfig(max_epochs=2))
    assert logged_steps(logger, "train/loss") == [2, 4, 5, 6, 8, 10]
    assert {"train/lr", "train/grad_norm", "perf/samples_per_s", "perf/step_time_p99_s"} <= logger.latest.keys()


@pytest.mark.parametrize("silent", [False, True])
def test_lines_about_tracking_are_there_unless_it_is_silent(
    train: Callable[..., Run], capsys: pytest.CaptureFixture[str], silent: bool
) -> None:
    train(TrainerConfig(max_epochs=1), tracking={"enabled": True, "offline": True, "silent": silent})
    lines = capsys.readouterr().err
    assert ("harness sync" in lines) is not silent
    assert "run a in" in lines


def test_only_what_is_asked_for_is_told_to_mlflow(train: Callable[..., Run]) -> None:
    def told(**tracking: Any) -> list[Entry]:
        more = {"enabled": True, "offline": True, **tracking}
        _, logger, _ = train(TrainerConfig(max_epochs=2), tracking=more, every_n_epochs=1, when_busy="wait")
        assert logger.run_path is not None
        return list(read_entries(logger.run_path / "outbox"))

    everything = told(log_resume_state="all", tags={"team": "vision"})
    published = [entry.body for entry in everything if entry.kind == "checkpoint"]
    assert [body["name"] for body in published] == ["epoch-0001", "epoch-0002"]
    for body in published:
        assert "trainer_state.json" in body["resume_files"]
        assert {*body["resume_files"], "model.safetensors", "manifest.json"} == {*body["files"]}
    assert sum(entry.kind == "dataset" for entry in everything) == 2
    assert any(entry.kind == "tags" and entry.body.get("team") == "vision" for entry in everything)
    assert all(not entry.body["resume_files"] for entry in told() if entry.kind == "checkpoint")
    assert not {entry.kind for entry in told(log_models=False, log_datasets=False)} & {"checkpoint", "dataset"}
