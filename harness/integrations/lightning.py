"""`HarnessCallback` for `lightning.pytorch.Trainer`: an MLflow run, and checkpoints that do not block training.

    trainer = Trainer(max_epochs=20, callbacks=[HarnessCallback(every_n_epochs=5)])

The Trainer resumes from its own checkpoints (``fit(ckpt_path=...)``), and the MLflow run of ``run_name`` is resumed
with it. The run receives what a module logs with ``self.log``, as each logger of the Trainer does.
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

# Class of the strategy -> our name, in search order.
_STRATEGIES = {
    "ModelParallelStrategy": "fsdp2",
    "FSDPStrategy": "fsdp1",
    "DDPStrategy": "ddp",
    "SingleDeviceStrategy": "single",
}
# Strategies whose module wrapper knows the local shard of the weights.
_WRAPPING = ("DeepSpeedStrategy", "FSDPStrategy")


class HarnessCallback(Callback):
    """Logs, saves and publishes what a `lightning.pytorch.Trainer` trains.

    Effects: collective, as the Trainer's hooks are: pass it on every rank. Creates ``<run_dir>/<run_name>/``.

    Args:
        every_n_epochs: epochs between checkpoints; None for no checkpoints by epochs.
        experiment_name: the MLflow experiment; None for that of ``MLFLOW_EXPERIMENT_ID`` (set by
            `mlflow.set_experiment`) or of ``MLFLOW_EXPERIMENT_NAME``, or else ``default``.
        run_name: name of the run's directory and of the MLflow run; None for a generated name. An existing run is
            resumed if the Trainer resumes.
        checkpoint: all other options of checkpoints.
        tracking: all other options of tracking.
        params: parameters to log beside the module's hyperparameters.
        input_example: an input batch of the module, for its signature in MLflow.
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
        self._run = CallbackBase(
            CallbackOptions(
                every_n_epochs, experiment_name, run_name, run_dir, checkpoint, tracking, params, input_example
            )
        )
        # Whether the latest batch was its epoch's last, an ended epoch is unreported, and the data is described.
        self._is_whole = self._is_epoch_over = self._is_described = False
        self._usual_size: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a logger. Not earlier: the directory of the Trainer's own checkpoints depends on its loggers."""
        self._add_logger(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a logger for a test, which belongs to the run of the last training, even from another Trainer."""
        self._add_logger(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a logger for a validation outside of a training."""
        self._add_logger(trainer)

    def _add_logger(self, trainer: Trainer) -> None:
        if not _is_dev_run(trainer) and not any(isinstance(logger, _Metrics) for logger in trainer.loggers):
            trainer.loggers = [*trainer.loggers, _Metrics(self._run)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin or resume the run, once the Trainer has prepared its objects and restored its checkpoint."""
        if _is_dev_run(trainer):
            return
        self._is_whole = self._is_epoch_over = self._is_described = False
        # Lightning's sampler already yields this rank's share alone.
        self._usual_size = dataloaders.local_batch_size(trainer.train_dataloader, 1)
        schedulers = trainer.lr_scheduler_configs
        with _environment(trainer):
            accelerator = Accelerator(cpu=trainer.strategy.root_device.type == "cpu")
            _check(accelerator, trainer)
            self._run.begin(
                accelerator,
                _model(trainer, pl_module),
                self._optimizer(trainer),
                schedulers[0].scheduler if len(schedulers) == 1 else None,
                completed=(trainer.current_epoch, trainer.global_step),
                params={"module": dict(pl_module.hparams), "trainer": _facts_of(trainer)},
                model_spec=_model_spec(pl_module),
                topology={"strategy": _strategy_of(trainer), "mixed_precision": str(trainer.precision)},
            )

    def _optimizer(self, trainer: Trainer) -> Any:
        checkpoint = self._run.options.checkpoint
        if len(trainer.optimizers) > 1 and not (checkpoint is not None and checkpoint.save_weights_only):
            raise ConfigError(
                "HarnessCallback",
                f"the module has {len(trainer.optimizers)} optimizers, and a checkpoint contains the state of one; use "
                "checkpoint=CheckpointConfig(save_weights_only=True)",
            )
        return trainer.optimizers[0] if len(trainer.optimizers) == 1 else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the previous epoch, whose metrics are logged by now, and begin the next one."""
        if self._run.is_open:
            self._end_epoch(is_last=False)
            self._run.begin_epoch()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Describe the data at the first batch; freeze the learning rates at the last, before epoch schedulers step."""
        if self._run.is_open and not self._is_described:
            self._is_described = True
            self._run.logger.describe_dataset(trainer.train_dataloader, batch=batch)
        if _is_last(trainer, batch_idx):
            self._run.freeze_learning_rates()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report a batch, which may complete an optimizer step."""
        if self._run.is_open:
            self._is_whole = _is_last(trainer, batch_idx)
            self._run.batch_done(
                batch_size(batch, self._usual_size), is_loaders_last=self._is_whole, step=trainer.global_step
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exclude a validation's time from the next step, and report its metrics if it ran outside of a training."""
        self._run.evaluated()
        self._report_test(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metrics of a test."""
        self._report_test(trainer)

    def _report_test(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, _Metrics):
                logger.report_collected()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the end of an epoch; its means are logged after this event."""
        # `is_last_batch` is also set if the module skips the remaining batches.
        self._is_whole |= trainer.is_last_batch
        self._is_epoch_over = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last epoch and the run."""
        if self._run.is_open:
            self._end_epoch(is_last=True)
            self._run.end()

    def _end_epoch(self, *, is_last: bool) -> None:
        if self._is_epoch_over:
            self._is_epoch_over = False
            self._run.end_epoch(is_whole=self._is_whole, is_last=is_last)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the run with the error or stop."""
        self._run.fail(exception)


class _Metrics(Logger):
    """Forwards reduced metrics from the Trainer to the run."""

    def __init__(self, run: CallbackBase) -> None:
        super().__init__()
        self._run = run
        # Metrics outside of a training, where each batch may log some.
        self._collected: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "harness"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics at the number of complete steps; Lightning counts `step` from zero."""
        # The run already has the number of complete epochs.
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        if self._run.is_open:
            self._run.report(values)
        else:
            self._collected |= values

    def report_collected(self) -> None:
        """Add the latest metrics of a test, or of a validation outside of a training, to the run."""
        values, self._collected = self._collected, {}
        if values:
            self._run.report(values)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run already has them."""


@contextmanager
def _environment(trainer: Trainer) -> Iterator[None]:
    """Set the variables from which accelerate reads the ranks; Lightning's launcher sets only some of them."""
    variables = {"ACCELERATE_TORCH_DEVICE": str(trainer.strategy.root_device)}
    if trainer.world_size > 1:
        variables |= {
            "RANK": str(trainer.global_rank),
            "LOCAL_RANK": str(trainer.local_rank),
            "WORLD_SIZE": str(trainer.world_size),
            "LOCAL_WORLD_SIZE": str(trainer.num_devices),
            # Otherwise accelerate changes the number of threads.
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
    """Refuse an accelerator that was configured earlier in this process for other ranks or another device."""
    found = (accelerator.num_processes, accelerator.process_index, accelerator.device.type)
    expected = (trainer.world_size, trainer.global_rank, trainer.strategy.root_device.type)
    if found != expected:
        raise LaunchError(
            f"accelerate was used earlier in this process, for rank {found[1]} of {found[0]} on {found[2]}, and the "
            f"Trainer has rank {expected[1]} of {expected[0]} on {expected[2]}; train in a process of its own"
        )


def _is_last(trainer: Trainer, batch_idx: int) -> bool:
    """Whether this batch is the epoch's last one, by the data or by the Trainer's limit."""
    return trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches


def _is_dev_run(trainer: Trainer) -> bool:
    """Whether this is a ``fast_dev_run``, which writes no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _is_a(trainer: Trainer, strategy: str) -> bool:
    """Compare by name, since the class of DeepSpeed exists only with DeepSpeed."""
    return any(base.__name__ == strategy for base in type(trainer.strategy).__mro__)


def _model(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Return the object that knows the local weights: DeepSpeed's engine, FSDP1's wrapper, or the module itself."""
    wrapper = trainer.strategy.model
    return wrapper if any(_is_a(trainer, each) for each in _WRAPPING) and wrapper is not None else module


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


def _model_spec(module: LightningModule) -> CallbackModelSpec | str:
    """Return the module's class and its saved hyperparameters, if these are all of its arguments."""
    found = next(base for base in type(module).__mro__ if not base.__name__.startswith("FSDP"))
    spec = ClassSpec(f"{found.__module__}.{found.__qualname__}", dict(module.hparams))
    try:
        check_spec("module", spec)
    except ConfigError as error:
        return f"{error} (its arguments are what save_hyperparameters() in its __init__ has kept)"
    return CallbackModelSpec(spec, ("lightning",), {})
