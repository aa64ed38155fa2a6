"""`HarnessCallback` for `transformers.Trainer`: an MLflow run, and checkpoints that do not block training.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[HarnessCallback(every_n_epochs=5)])

The Trainer resumes from its own checkpoints (``resume_from_checkpoint``), and the MLflow run of ``run_name`` is resumed
with it. All strategies that the Trainer uses through accelerate are supported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn

from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.names import unwrapped
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.errors import ConfigError, HarnessError, Stopped
from harness.integrations.callback_base import CallbackBase, CallbackModelSpec, CallbackOptions
from harness.models.model_spec import ExampleSource

try:
    from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise ConfigError(
        "harness.integrations.transformers", f"needs transformers: pip install 'harness[transformers]' ({error})"
    ) from error

# Logged by the Trainer, and already in the run as train/lr and epoch.
_KNOWN = ("learning_rate", "epoch")


class HarnessCallback(TrainerCallback):
    """Logs, saves and publishes what a `transformers.Trainer` trains.

    Effects: collective, as the Trainer's events are: pass it on every rank. Creates ``<run_dir>/<run_name>/``. Removes
    the Trainer's ``MLflowCallback``, which would start a second run.

    Args:
        every_n_epochs: epochs between checkpoints; None for no checkpoints by epochs.
        experiment_name: the MLflow experiment; None for that of ``MLFLOW_EXPERIMENT_ID`` (set by
            `mlflow.set_experiment`) or of ``MLFLOW_EXPERIMENT_NAME``, or else ``default``.
        run_name: name of the run's directory and of the MLflow run; None for a generated name. An existing run is
            resumed if the Trainer resumes.
        checkpoint: all other options of checkpoints.
        tracking: all other options of tracking.
        params: parameters to log beside the Trainer's arguments and the model's configuration.
        input_example: an input batch of the model, for its signature in MLflow.
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
        self._stopped: Stopped | None = None
        # Whether an ended, unreported epoch had its last batch; None without one. Its metrics are logged later.
        self._was_whole: bool | None = None
        self._has_batches = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the Trainer's MLflow callback before it can start a run."""
        _remove_mlflow_callback(_trainer())

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: Any,
    ) -> None:
        """Begin or resume the run, once the Trainer has prepared its objects and restored its checkpoint."""
        trainer = _trainer()
        _remove_mlflow_callback(trainer)
        self._stopped, self._was_whole = None, None
        model = trainer.model_wrapped
        config = getattr(unwrapped(model), "config", None)
        self._run.begin(
            trainer.accelerator,
            model,
            parts["optimizer"],
            parts["lr_scheduler"],
            completed=(_epochs_done(trainer, parts["train_dataloader"], self._run.options), state.global_step),
            params={"args": _values(args), **({} if config is None else {"model": config.to_dict()})},
            model_spec=_model_spec(unwrapped(model)),
        )
        self._describe(parts["train_dataloader"], model)

    def _describe(self, loader: Any, model: nn.Module) -> None:
        """Record the training data at the model's first forward, since no event has a batch."""
        logger = self._run.logger

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():  # an evaluation may come before the first step
                hook.remove()
                logger.describe_dataset(loader, batch=[args, kwargs])

        hook = model.register_forward_pre_hook(record, with_kwargs=True)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the previous epoch, and begin the next one."""
        self._end_epoch(is_last=False)
        self._has_batches = False
        self._run.begin_epoch()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report a batch whose gradients are only accumulated."""
        self._has_batches = True
        self._run.batch_done(args.train_batch_size, is_loaders_last=False, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report a batch that completes an optimizer step."""
        self._has_batches = True
        try:
            self._run.batch_done(args.train_batch_size, is_loaders_last=self._is_whole(state), step=state.global_step)
        except Stopped as stopped:
            # The Trainer resumes from its own checkpoint, so it must write one too.
            self._stopped = stopped
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note the end of an epoch. Its evaluation follows this event, and its checkpoint follows the evaluation."""
        if self._stopped is not None:
            control.should_evaluate = False
        elif self._has_batches:
            # A Trainer that resumes in an iterable dataset skips completed steps in iterations without a batch.
            continues = not (control.should_training_stop or control.should_epoch_stop)
            self._was_whole = continues or self._is_whole(state)
            # A plateau scheduler changes the rates in the evaluation.
            self._run.freeze_learning_rates()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Report metrics, which the Trainer has reduced."""
        if "train_runtime" in parts["logs"]:
            # These are the last metrics of the training, before the Trainer loads its best weights.
            self._end_epoch(is_last=True)
            # A save at a step may be running without the end of an epoch.
            self._run.finish_copy()
        self._run.report({_named(key): value for key, value in parts["logs"].items() if key not in _KNOWN})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Exclude an evaluation's time from the next step."""
        self._run.evaluated()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any
    ) -> None:
        """Report the metrics of a prediction, which the Trainer does not log."""
        self._run.report({_named(key): value for key, value in (metrics or {}).items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the run, or fail it if a signal stopped training."""
        if self._stopped is not None:
            raise self._run.fail(self._stopped)
        self._end_epoch(is_last=True)
        self._run.end()

    def _end_epoch(self, *, is_last: bool) -> None:
        if self._was_whole is not None:
            was_whole, self._was_whole = self._was_whole, None
            self._run.end_epoch(is_whole=was_whole, is_last=is_last)

    def _is_whole(self, state: TrainerState) -> bool:
        """Whether this batch is the epoch's last one.

        `state.epoch` counts epochs exactly. For data without a length it is a fraction of `max_steps`, but accelerate
        detects the end.
        """
        return float(state.epoch).is_integer() or self._run.logger.accelerator.gradient_state.end_of_dataloader


class Pretrained:
    """Builds the model of a published checkpoint from its configuration, for `harness.load_model`.

    Args:
        architecture: the model's class. A model spec has its import path. The annotation lets
            `harness.models.described_model` import it, from ``transformers`` or from a package that the caller trusts.
    """

    def __init__(self, architecture: type[PreTrainedModel], config: dict[str, Any]) -> None:
        self.architecture = architecture
        self.config = config

    def model(self) -> nn.Module:
        """Build the model with its initial weights."""
        found: Any = self.architecture
        model: nn.Module = found._from_config(found.config_class.from_dict(self.config))
        return model


def _model_spec(model: nn.Module) -> CallbackModelSpec | str:
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers.PreTrainedModel, which its configuration could rebuild"
    # Skip the class that FSDP2 derives.
    found = next(base for base in type(model).__mro__ if not base.__name__.startswith("FSDP"))
    if found.__module__ == "__main__":
        return f"{found.__name__} can only be imported by this script; move the class to a module"
    text = model.config.to_json_string(use_diff=False)
    spec = ClassSpec(
        f"{__name__}.{Pretrained.__qualname__}",
        {"architecture": f"{found.__module__}.{found.__qualname__}", "config": json.loads(text)},
    )
    # The format that from_pretrained reads.
    values = {**json.loads(model.config.to_json_string()), "architectures": [found.__name__]}
    return CallbackModelSpec(
        spec, ("transformers",), {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    )


def _epochs_done(trainer: Trainer, loader: Any, options: CallbackOptions) -> int:
    """Count the epochs that are complete as training begins. Collective if resuming in data without a length.

    For such data the Trainer skips all completed steps within its first epoch; only the checkpoints have the count.
    """
    state = trainer.state
    found = [int(state.epoch or 0)]
    if state.global_step == 0 or options.run_name is None or has_length(loader):
        return found[0]
    if trainer.accelerator.is_main_process:
        # Unreadable checkpoints fail the start of the run on all ranks.
        with suppress(OSError, HarnessError):
            known = list_checkpoints(Path(options.run_dir) / options.run_name / "checkpoints")
            found += [manifest.epoch for _, manifest in known if manifest.step <= state.global_step]
    return int(broadcast(torch.tensor([max(found)], device=trainer.accelerator.device)))


def _values(args: Any) -> dict[str, Any]:
    """Return the Trainer's arguments; `to_dict` redacts tokens."""
    values: dict[str, Any] = args.to_dict()
    return values


def _named(key: str) -> str:
    """Return the name that the Trainer's TensorBoard uses: eval_loss -> eval/loss, others -> train/..."""
    for prefix in ("eval", "test"):
        if key.startswith(f"{prefix}_"):
            return f"{prefix}/{key.removeprefix(f'{prefix}_')}"
    return f"train/{key}"


def _trainer() -> Trainer:
    """Find the calling Trainer on the stack, since the events lack its accelerator."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise HarnessError(
        "HarnessCallback: the caller is no transformers.Trainer; in a loop of your own use PeriodicLogger"
    )


def _remove_mlflow_callback(trainer: Trainer) -> None:
    """Remove the Trainer's MLflow callback, which starts a second run; refuse one that has started it."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ != "MLflowCallback":
            continue
        if callback._initialized:
            raise HarnessError(
                "HarnessCallback: the Trainer's MLflowCallback has started a run of its own; remove mlflow from "
                "TrainingArguments(report_to=...), or pass HarnessCallback in Trainer(callbacks=[...])"
            )
        trainer.remove_callback(callback)
