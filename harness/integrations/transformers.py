"""`HarnessCallback` for `transformers.Trainer`: a run in MLflow, and checkpoints that training does not wait for.

    trainer = Trainer(model, args, train_dataset=..., callbacks=[HarnessCallback(every_n_epochs=5)])

The Trainer goes on by itself (``resume_from_checkpoint``), from its own checkpoints; the MLflow run goes on with it,
where ``run_name`` says which. Under every strategy that the Trainer has from accelerate.
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

# The Trainer's own; the run has them already, as train/lr and epoch.
_KNOWN = ("learning_rate", "epoch")


class HarnessCallback(TrainerCallback):
    """Logs, saves and publishes what a `transformers.Trainer` trains.

    Effects: collective, as the Trainer's events are: give it on every rank. Leaves ``<run_dir>/<run_name>/``. The
    Trainer's own ``MLflowCallback`` is taken out: it would begin a second run.

    Args:
        every_n_epochs: a checkpoint each so many epochs; None: not by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: of the run's directory and the MLflow run; None: made up. A run of this name goes on, if the Trainer
            does.
        run_dir: the directory that the runs' directories are in.
        checkpoint: everything else about checkpoints.
        tracking: everything else about tracking.
        params: parameters to log beside the Trainer's arguments and the model's configuration.
        input_example: a batch of what the model takes, for its signature in MLflow.
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
        self._stopped: Stopped | None = None
        # Of the epoch that is over, and whose end is still to be told, since what is logged of it is to come: whether
        # it had its last batch. None: there is none.
        self._was_whole: bool | None = None
        # Batches are done in this pass over the data.
        self._has_batches = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the Trainer's own callback could begin a run."""
        _take_out_mlflow(_trainer())

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **parts: Any,
    ) -> None:
        """The Trainer has prepared everything, and put back what it goes on from."""
        trainer = _trainer()
        _take_out_mlflow(trainer)
        self._stopped, self._was_whole = None, None
        model = trainer.model_wrapped
        config = getattr(unwrapped(model), "config", None)
        self._guest.begin(
            trainer.accelerator,
            model,
            parts["optimizer"],
            parts["lr_scheduler"],
            completed=(_epochs_done(trainer, parts["train_dataloader"], self._guest.options), state.global_step),
            params={"args": _values(args), **({} if config is None else {"model": config.to_dict()})},
            recipe=_recipe(unwrapped(model)),
        )
        self._describe(parts["train_dataloader"], model)

    def _describe(self, loader: Any, model: nn.Module) -> None:
        """Record the training data with the first batch, which no event has: the model's first forward does."""
        logger = self._guest.logger

        def has_batch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.is_grad_enabled():  # an evaluation may come before the first step
                hook.remove()
                logger.describe_dataset(loader, batch=[args, kwargs])

        hook = model.register_forward_pre_hook(has_batch, with_kwargs=True)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch begins."""
        self._end_epoch(is_last=False)
        self._has_batches = False
        self._guest.begin_epoch()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A batch is done, and its gradients are accumulated."""
        self._has_batches = True
        self._guest.batch_done(args.train_batch_size, is_loaders_last=False, step=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A batch is done, and with it an optimizer step."""
        self._has_batches = True
        try:
            self._guest.batch_done(args.train_batch_size, is_loaders_last=self._is_whole(state), step=state.global_step)
        except Stopped as stopped:
            # It goes on from its own checkpoint, so it has to write one too.
            self._stopped = stopped
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An epoch is over; the checkpoint of its end is to have its evaluation, which comes behind this."""
        if self._stopped is not None:
            control.should_evaluate = False
        elif self._has_batches:
            # Whoever goes on in a stream, as the Trainer does, passes over what was done in passes without a batch.
            goes_on = not (control.should_training_stop or control.should_epoch_stop)
            self._was_whole = goes_on or self._is_whole(state)
            # The evaluation moves them, where they wait for a plateau.
            self._guest.keep_rates()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Metrics, which the Trainer has reduced."""
        if "train_runtime" in parts["logs"]:
            # Of all the training: the last that is logged, before the Trainer takes its best weights back.
            self._end_epoch(is_last=True)
            # A save at a step may be in flight without an epoch's end.
            self._guest.finish_copy()
        self._guest.report({_named(key): value for key, value in parts["logs"].items() if key not in _KNOWN})

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Which is no step's time."""
        self._guest.evaluated()

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any, **_: Any
    ) -> None:
        """The Trainer does not log what it has measured here."""
        self._guest.report({_named(key): value for key, value in (metrics or {}).items()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Training is complete, or has stopped in good order."""
        if self._stopped is not None:
            raise self._guest.fail(self._stopped)
        self._end_epoch(is_last=True)
        self._guest.end()

    def _end_epoch(self, *, is_last: bool) -> None:
        if self._was_whole is not None:
            was_whole, self._was_whole = self._was_whole, None
            self._guest.end_epoch(is_whole=was_whole, is_last=is_last)

    def _is_whole(self, state: TrainerState) -> bool:
        """Whether this batch is the epoch's last.

        The epoch's fraction is of batches, and is exact then. Where the data have no length it is one of `max_steps`,
        and accelerate's loader has seen that nothing follows.
        """
        return float(state.epoch).is_integer() or self._guest.logger.accelerator.gradient_state.end_of_dataloader


class Pretrained:
    """Makes the model of a published checkpoint from its configuration, for `harness.load_model`.

    Args:
        architecture: the model's class. A recipe has its import path, which `harness.described_model` checks and
            imports because of the annotation: it is below ``transformers`` or below a package that the caller trusts.
        config: the values of its configuration.
    """

    def __init__(self, architecture: type[PreTrainedModel], config: dict[str, Any]) -> None:
        self.architecture = architecture
        self.config = config

    def model(self) -> nn.Module:
        """Build the model with its initial weights."""
        found: Any = self.architecture
        model: nn.Module = found._from_config(found.config_class.from_dict(self.config))
        return model


def _recipe(model: nn.Module) -> CallbackModelSpec | str:
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is no transformers.PreTrainedModel, which a configuration builds again"
    # FSDP2 makes a subclass on the fly.
    found = next(base for base in type(model).__mro__ if not base.__name__.startswith("FSDP"))
    if found.__module__ == "__main__":
        return f"{found.__name__} can only be imported by this script; move the class to a module"
    text = model.config.to_json_string(use_diff=False)
    spec = ClassSpec(
        f"{__name__}.{Pretrained.__qualname__}",
        {"architecture": f"{found.__module__}.{found.__qualname__}", "config": json.loads(text)},
    )
    # What from_pretrained looks for.
    values = {**json.loads(model.config.to_json_string()), "architectures": [found.__name__]}
    return CallbackModelSpec(
        spec, ("transformers",), {"config.json": json.dumps(values, indent=2, sort_keys=True) + "\n"}
    )


def _epochs_done(trainer: Trainer, loader: Any, options: CallbackOptions) -> int:
    """Epochs that are complete as training begins. Collective where it goes on in data without a length.

    There the Trainer passes over steps as if all were of the first epoch, and counts from it; the run has counted more.
    """
    state = trainer.state
    found = [int(state.epoch or 0)]
    if state.global_step == 0 or options.run_name is None or has_length(loader):
        return found[0]
    if trainer.accelerator.is_main_process:
        # Where they cannot be read it is for whoever begins the run to say so, on all ranks.
        with suppress(OSError, HarnessError):
            known = list_checkpoints(Path(options.run_dir) / options.run_name / "checkpoints")
            found += [manifest.epoch for _, manifest in known if manifest.step <= state.global_step]
    return int(broadcast(torch.tensor([max(found)], device=trainer.accelerator.device)))


def _values(args: Any) -> dict[str, Any]:
    """Of the Trainer's arguments, tokens replaced."""
    values: dict[str, Any] = args.to_dict()
    return values


def _named(key: str) -> str:
    """As the Trainer's TensorBoard has it: eval_loss -> eval/loss, all else train/..."""
    for prefix in ("eval", "test"):
        if key.startswith(f"{prefix}_"):
            return f"{prefix}/{key.removeprefix(f'{prefix}_')}"
    return f"train/{key}"


def _trainer() -> Trainer:
    """The Trainer that calls: callbacks are given its parts, and not its accelerator.

    Raises:
        HarnessError: if nobody of that kind calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise HarnessError(
        "HarnessCallback: is called by no transformers.Trainer; in a loop of your own use PeriodicLogger"
    )


def _take_out_mlflow(trainer: Trainer) -> None:
    """The Trainer's own callback begins a second run, and has it wait for the server.

    Raises:
        HarnessError: if it has begun one already.
    """
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ != "MLflowCallback":
            continue
        if callback._initialized:
            raise HarnessError(
                "HarnessCallback: the Trainer's MLflowCallback has begun a run of its own; leave mlflow out of "
                "TrainingArguments(report_to=...), or give HarnessCallback in Trainer(callbacks=[...])"
            )
        trainer.remove_callback(callback)
