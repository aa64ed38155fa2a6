"""`HarnessCallback` for `lightning.pytorch.Trainer`: a run in MLflow, and checkpoints that training does not wait for.

    trainer = Trainer(max_epochs=20, callbacks=[HarnessCallback(every_n_epochs=5)])

The Trainer goes on by itself (``fit(ckpt_path=...)``), from its own checkpoints; the MLflow run goes on with it, where
``run_name`` says which. What a module logs with ``self.log`` is in the run, as it is in any logger of the Trainer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.data import dataloaders
from harness.data.batch_size import batch_size
from harness.errors import ConfigError, LaunchError
from harness.integrations.callback_base import CallbackBase, CallbackModelSpec, CallbackOptions
from harness.models.model_spec import ExampleSource, check_spec

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
except ImportError as error:
    raise ConfigError(
        "harness.integrations.lightning", f"needs lightning: pip install 'harness[lightning]' ({error})"
    ) from error

# Class of the strategy -> its name here, in the order in which they are looked for.
_STRATEGIES = {
    "ModelParallelStrategy": "fsdp2",
    "FSDPStrategy": "fsdp1",
    "DDPStrategy": "ddp",
    "SingleDeviceStrategy": "single",
}
# What these make of the module knows which part of it is here.
_WRAPPING = ("DeepSpeedStrategy", "FSDPStrategy")


class HarnessCallback(Callback):
    """Logs, saves and publishes what a `lightning.pytorch.Trainer` trains.

    Effects: collective, as the Trainer's hooks are: give it on every rank. Leaves ``<run_dir>/<run_name>/``.

    Args:
        every_n_epochs: a checkpoint each so many epochs; None: not by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: of the run's directory and the MLflow run; None: made up. A run of this name goes on, if the Trainer
            does.
        run_dir: the directory that the runs' directories are in.
        checkpoint: everything else about checkpoints.
        tracking: everything else about tracking.
        params: parameters to log beside the module's hyperparameters.
        input_example: a batch of what the module takes, for its signature in MLflow.
    """

    def __init__(
        self,
        every_n_epochs: int | None = 5,
        experiment_name: str | None = None,
        run_name: str | None = None,
        run_dir: str | Path = "runs",
        checkpoint: CheckpointConfig | None = None,
        tracking: TrackingConfig | None = None,
        params: Mapping[str, Any] | None = None,
        input_example: ExampleSource = None,
    ) -> None:
        self._guest = CallbackBase(
            CallbackOptions(
                every_n_epochs, experiment_name, run_name, run_dir, checkpoint, tracking, params, input_example
            )
        )
        # Whether the last batch was the last one of its epoch; whether an epoch's end is still to be told.
        self._is_whole = self._is_epoch_over = self._is_described = False
        self._usual_size: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Be told of metrics. Not earlier: where a Trainer puts its own checkpoints depends on its loggers."""
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A test, whose metrics belong to the run of the training before; its Trainer may be another."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise a validation that is asked for by itself."""
        self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        if not _is_tried_out(trainer) and not any(isinstance(logger, _Metrics) for logger in trainer.loggers):
            trainer.loggers = [*trainer.loggers, _Metrics(self._guest)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The Trainer has set everything up, and put back what it goes on from."""
        if _is_tried_out(trainer):
            return
        self._is_whole = self._is_epoch_over = self._is_described = False
        # Lightning's sampler is this rank's own.
        self._usual_size = dataloaders.local_batch_size(trainer.train_dataloader, 1)
        schedulers = trainer.lr_scheduler_configs
        with _environment(trainer):
            accelerator = Accelerator(cpu=trainer.strategy.root_device.type == "cpu")
            _check(accelerator, trainer)
            self._guest.begin(
                accelerator,
                _model(trainer, pl_module),
                self._optimizer(trainer),
                schedulers[0].scheduler if len(schedulers) == 1 else None,
                completed=(trainer.current_epoch, trainer.global_step),
                params={"module": dict(pl_module.hparams), "trainer": _facts_of(trainer)},
                recipe=_recipe(pl_module),
                topology={"strategy": _strategy_of(trainer), "mixed_precision": str(trainer.precision)},
            )

    def _optimizer(self, trainer: Trainer) -> Any:
        checkpoint = self._guest.options.checkpoint
        if len(trainer.optimizers) > 1 and not (checkpoint is not None and checkpoint.save_weights_only):
            raise ConfigError(
                "HarnessCallback",
                f"the module has {len(trainer.optimizers)} optimizers, and a checkpoint holds the state of one; use "
                "checkpoint=CheckpointConfig(save_weights_only=True)",
            )
        return trainer.optimizers[0] if len(trainer.optimizers) == 1 else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch begins, and the end of the one before has been logged."""
        if self._guest.is_open:
            self._end_epoch(is_last=False)
            self._guest.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The epoch's last batch begins: with its end the schedulers step that count epochs."""
        if self._guest.is_open and not self._is_described:
            self._is_described = True
            self._guest.logger.describe_dataset(trainer.train_dataloader, batch=batch)
        if _is_last(trainer, batch_idx):
            self._guest.keep_rates()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch is done, and an optimizer step or none."""
        if self._guest.is_open:
            self._is_whole = _is_last(trainer, batch_idx)
            self._guest.batch_done(
                batch_size(batch, self._usual_size), is_loaders_last=self._is_whole, step=trainer.global_step
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Which is no step's time."""
        self._guest.evaluated()
        self._report_test(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Everything of a test has been logged."""
        self._report_test(trainer)

    def _report_test(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, _Metrics):
                logger.report_collected()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch is over; its own means are logged behind this."""
        # Also where the module has left out the rest of its batches.
        self._is_whole |= trainer.is_last_batch
        self._is_epoch_over = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is complete."""
        if self._guest.is_open:
            self._end_epoch(is_last=True)
            self._guest.end()

    def _end_epoch(self, *, is_last: bool) -> None:
        if self._is_epoch_over:
            self._is_epoch_over = False
            self._guest.end_epoch(is_whole=self._is_whole, is_last=is_last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Training has failed, or was stopped."""
        self._guest.fail(exception)


class _Metrics(Logger):
    """Takes what the Trainer logs, reduced and when it is due, as the Trainer's other loggers do."""

    def __init__(self, guest: CallbackBase) -> None:
        super().__init__()
        self._guest = guest
        # What is logged when no training runs: of a test, whose batches may each log something.
        self._collected: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Of the kind."""
        return "harness"

    @property
    def version(self) -> str:
        """There is none: the run's name is the callback's."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """At the number of steps that are complete: Lightning's own counts from zero."""
        # The run has the number of epochs that are complete.
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if self._guest.is_open:
            self._guest.report(values)
        else:
            self._collected |= values

    def report_collected(self) -> None:
        """A test or a validation outside training is over: its latest values go to the run together."""
        values, self._collected = self._collected, {}
        if values:
            self._guest.report(values)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in the run already."""


@contextmanager
def _environment(trainer: Trainer) -> Iterator[None]:
    """What launchers set, and Lightning's sets in part: accelerate finds the ranks by it."""
    variables = {"ACCELERATE_TORCH_DEVICE": str(trainer.strategy.root_device)}
    if trainer.world_size > 1:
        variables |= {
            "RANK": str(trainer.global_rank),
            "LOCAL_RANK": str(trainer.local_rank),
            "WORLD_SIZE": str(trainer.world_size),
            "LOCAL_WORLD_SIZE": str(trainer.num_devices),
            # Where there is none, accelerate sets the number of this process's threads.
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check(accelerator: Accelerator, trainer: Trainer) -> None:
    """Refuse what accelerate was made for before, in this process.

    Raises:
        LaunchError: if it is of other ranks or another device.
    """
    found = (accelerator.num_processes, accelerator.process_index, accelerator.device.type)
    expected = (trainer.world_size, trainer.global_rank, trainer.strategy.root_device.type)
    if found != expected:
        raise LaunchError(
            f"accelerate was used in this process before, for rank {found[1]} of {found[0]} on {found[2]}, and the "
            f"Trainer has rank {expected[1]} of {expected[0]} on {expected[2]}; train in a process of its own"
        )


def _is_last(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch is the epoch's last, of the data or of as many as there are to be."""
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


def _is_tried_out(trainer: Trainer) -> bool:
    """With ``fast_dev_run``, after which nothing is to be left."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _is_a(trainer: Trainer, strategy: str) -> bool:
    """By name: that of DeepSpeed is there only where DeepSpeed is."""
    return any(base.__name__ == strategy for base in type(trainer.strategy).__mro__)


def _model(trainer: Trainer, module: LightningModule) -> nn.Module:
    """What knows which part of it is here: DeepSpeed's engine, FSDP1's wrapper, and else the module itself."""
    made = trainer.strategy.model
    return made if any(_is_a(trainer, each) for each in _WRAPPING) and made is not None else module


def _strategy_of(trainer: Trainer) -> str:
    if _is_a(trainer, "DeepSpeedStrategy"):
        return f"zero{_zero_stage(trainer)}"
    name = type(trainer.strategy).__name__
    return next((ours for theirs, ours in _STRATEGIES.items() if _is_a(trainer, theirs)), name)


def _zero_stage(trainer: Trainer) -> int:
    engine: Any = trainer.strategy.model
    return int(engine.zero_optimization_stage())


def _facts_of(trainer: Trainer) -> dict[str, Any]:
    return {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "precision": str(trainer.precision),
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
    }


def _recipe(module: LightningModule) -> CallbackModelSpec | str:
    """By the module's class and its hyperparameters, where it has saved them and they are all that it takes."""
    found = next(base for base in type(module).__mro__ if not base.__name__.startswith("FSDP"))
    spec = ClassSpec(f"{found.__module__}.{found.__qualname__}", dict(module.hparams))
    try:
        check_spec("module", spec)
    except ConfigError as error:
        return f"{error} (its arguments are what save_hyperparameters() in its __init__ has kept)"
    return CallbackModelSpec(spec, ("lightning",), {})
