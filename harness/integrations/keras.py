"""`HarnessCallback` for Keras 3 with its torch backend: an MLflow run, and checkpoints in safetensors.

    model.fit(x, y, epochs=20, callbacks=[HarnessCallback(every_n_epochs=5)])

Keras generates names (``dense_3``), and others when a model is rebuilt. A checkpoint therefore uses its own names:
``<layer>.<variable>`` for weights, and ``<slot>.<layer>.<variable>`` for optimizer state, with Keras's slot names
(``momentum``, ``velocity``). ``step`` counts optimizer steps, and ``iteration`` batches if gradients are accumulated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from harness.checkpoint.format.commit import list_checkpoints
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.errors import ConfigError, Stopped
from harness.integrations.callback_base import CallbackBase, CallbackModelSpec, CallbackOptions
from harness.models import mlflow_flavor
from harness.models.model_spec import ExampleSource

_REMEDY = "set KERAS_BACKEND=torch in the environment, before keras is imported"
try:
    import keras
except ImportError as error:
    raise ConfigError(
        "harness.integrations.keras", f"needs keras: pip install 'harness[keras]', and {_REMEDY} ({error})"
    ) from error
if keras.backend.backend() != "torch":
    raise ConfigError(
        "harness.integrations.keras", f"needs keras's torch backend, got {keras.backend.backend()}; {_REMEDY}"
    )


class HarnessCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Logs, saves and publishes what `keras.Model.fit` trains.

    Effects: main thread. Creates ``<run_dir>/<run_name>/``.

    Args:
        every_n_epochs: epochs between checkpoints; None for no checkpoints by epochs.
        experiment_name: the MLflow experiment; None for that of ``MLFLOW_EXPERIMENT_ID`` (set by
            `mlflow.set_experiment`) or of ``MLFLOW_EXPERIMENT_NAME``, or else ``default``.
        run_name: name of the run's directory and of the MLflow run; None for a generated name. An existing run is
            resumed if `fit` resumes: from the optimizer's count of steps and ``initial_epoch``, which
            `keras.callbacks.BackupAndRestore` restores.
        checkpoint: all other options of checkpoints.
        tracking: all other options of tracking.
        params: parameters to log beside the optimizer's.
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
        super().__init__()
        self._run = CallbackBase(
            CallbackOptions(
                every_n_epochs, experiment_name, run_name, run_dir, checkpoint, tracking, params, input_example
            )
        )
        self._optimizer: _Optimizer | None = None
        # Batches in total, and in the current epoch.
        self._num_batches = self._in_epoch = 0
        self._is_incomplete = False
        # The learning rate at the epoch's last batch, if its length is known, before callbacks change it.
        self._rate: float | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Fail a previous run that is still open, since `fit` does not report errors."""
        CallbackBase.fail_open_run()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Begin an epoch. The first one begins the run, since its number is known only now."""
        if not self._run.is_open:
            self._begin(epoch)
        self._in_epoch, self._is_incomplete, self._rate = 0, False, None
        self._run.begin_epoch()

    def _begin(self, epoch: int) -> None:
        model = Weights(self.model)
        self._optimizer = _Optimizer(self.model.optimizer, model)
        self._num_batches = self._optimizer.num_batches
        step = self._optimizer.steps_of(self._num_batches)
        _check_count(self._run.options, epoch, step)
        self._run.begin(
            Accelerator(cpu=model.device.type == "cpu"),
            model,
            self._optimizer,
            None,
            completed=(epoch, step),
            params={"optimizer": self.model.optimizer.get_config(), "fit": dict(self.params)},
            model_spec=_model_spec(self.model),
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Report a batch, or several that are executed together."""
        assert self._optimizer is not None
        self._optimizer.follow()
        self._num_batches += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._optimizer.may_skip:
            self._num_batches = self._optimizer.num_batches
        is_last = self._in_epoch == self.params["steps"]
        self._is_incomplete = self.model.stop_training and not is_last
        if is_last:
            self._rate = self._optimizer.rate
        try:
            self._run.batch_done(0, is_loaders_last=is_last, step=self._optimizer.steps_of(self._num_batches))
        except Stopped as stopped:
            raise self._run.fail(stopped) from None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Report the metrics and the end of an epoch, after its evaluation."""
        assert self._optimizer is not None
        values = {_named(key): value for key, value in (logs or {}).items()}
        self._run.report({**values, "train/lr": self._optimizer.rate if self._rate is None else self._rate})
        stops = self.model.stop_training
        # A later callback may also have stopped training within the epoch, which shows if the length is known.
        is_incomplete = self._is_incomplete or (stops and self._in_epoch < (self.params["steps"] or 0))
        self._run.end_epoch(is_whole=not is_incomplete, is_last=stops or epoch + 1 == self.params["epochs"])

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Report an evaluation outside of `fit`. One within `fit` is reported at the epoch's end."""
        if not self._run.is_open:
            self._run.report({f"test/{key}": value for key, value in (logs or {}).items()})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """End the run."""
        if self._run.is_open:
            self._run.end()


class Weights(nn.Module):
    """Exposes the variables of a built Keras model as parameters, with the same names each time it is built.

    Raises:
        ConfigError: if the model is not built, so that it has no variables.
    """

    keras_model: Any

    def __init__(self, keras_model: Any) -> None:
        super().__init__()
        if not keras_model.built:
            raise ConfigError("", "the Keras model is not built; give it an Input, or call it once")
        # A submodule would register the variables twice.
        object.__setattr__(self, "keras_model", keras_model)
        self.names: dict[str, str] = {}
        for name, variable in _named_variables(keras_model):
            self._parameters[name] = variable.value
            self.names[variable.path] = name

    @property
    def device(self) -> torch.device:
        """The device of the variables."""
        return next((tensor.device for tensor in self._parameters.values() if tensor is not None), torch.device("cpu"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model, for inference unless the module is in training mode."""
        return self.keras_model(*args, training=self.training, **kwargs)


class FromConfig:
    """Builds the model of a published checkpoint from its ``to_json`` configuration, for `harness.load_model`."""

    def __init__(self, config: str) -> None:
        self.config = config

    def model(self) -> nn.Module:
        """Build the model with initial weights."""
        return Weights(keras.models.model_from_json(self.config))


def load_model(where: str | Path) -> Any:
    """Load the Keras model of a checkpoint, with the errors of `harness.load_model`, which returns its `Weights`."""
    return mlflow_flavor.load_model(where).keras_model


class _Optimizer:
    """Gives a Keras optimizer the interface of torch's: ``param_groups``, and ``state`` by parameter.

    Keras steps it without torch's hooks, so training waits until a checkpoint is copied. `may_skip` is whether the
    optimizer may skip a step (loss-scale overflow).
    """

    def __init__(self, optimizer: Any, weights: Weights) -> None:
        self._inner = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer
        self._trained = list(weights.keras_model.trainable_variables)
        self._accumulation = int(self._inner.gradient_accumulation_steps or 1)
        # `iteration` counts batches; `iterations` counts steps, but as a new tensor each time if accumulating.
        self._iteration = next(each.value for each in self._inner.variables if each.name == "iteration")
        self._counts = {"step": self._iteration}
        if self._accumulation > 1:
            self._counts = {"step": torch.empty_like(self._iteration), "iteration": self._iteration}
        self.may_skip = self._inner is not optimizer
        self.state: dict[Any, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = [{"params": [variable.value for variable in self._trained]}]
        self.follow()

    @property
    def num_batches(self) -> int:
        """Batches so far, including those whose step is not complete. Effects: waits for the device."""
        return int(self._iteration)

    def steps_of(self, num_batches: int) -> int:
        """Return the optimizer steps that are complete after this number of batches."""
        return num_batches // self._accumulation

    @property
    def rate(self) -> float:
        return float(self._inner.learning_rate)

    def follow(self) -> None:
        """Update the step count on the device after a batch; find the state, which the first step creates."""
        if self._accumulation > 1:
            torch.div(self._iteration, self._accumulation, rounding_mode="floor", out=self._counts["step"])
        if self.state or not self._inner.built:
            return
        prefixes = {variable.path.replace("/", "_") + "_": variable for variable in self._trained}
        for slot in self._inner.variables:
            # Use the longest prefix, since one variable's name may begin with another's.
            prefix = max((each for each in prefixes if slot.name.startswith(each)), key=len, default=None)
            if prefix is not None:
                kinds = self.state.setdefault(prefixes[prefix].value, dict(self._counts))
                kinds[slot.name.removeprefix(prefix)] = slot.value


def _named_variables(keras_model: Any) -> list[tuple[str, Any]]:
    """Name variables ``<layer>.<variable>``, with an index if a layer repeats a name: ``mha.2.kernel``."""
    found: dict[int, tuple[str, Any]] = {}
    for layer in (*keras_model.layers, keras_model):
        own = [variable for variable in layer.variables if id(variable) not in found]
        counts = Counter(variable.name for variable in own)
        for index, variable in enumerate(own):
            number = f"{index}." if counts[variable.name] > 1 else ""
            prefix = "" if layer is keras_model else f"{layer.name}."
            found[id(variable)] = (f"{prefix}{number}{variable.name}", variable)
    return list(found.values())


def _check_count(options: CallbackOptions, epoch: int, step: int) -> None:
    """Refuse a second `fit` that counts its epochs from 0: checkpoints of these names already exist."""
    if options.run_name is None:
        return
    for name, manifest in list_checkpoints(Path(options.run_dir) / options.run_name / "checkpoints")[::-1]:
        if manifest.step <= step and manifest.epoch > epoch:
            raise ConfigError(
                "HarnessCallback",
                f"fit begins at epoch {epoch}, with an optimizer that has taken {step} steps, and {options.run_name} "
                f"has {name} of step {manifest.step} already; pass initial_epoch={manifest.epoch} to fit, or another "
                "run_name to the callback",
            )


def _model_spec(keras_model: Any) -> CallbackModelSpec | str:
    try:
        config = keras_model.to_json()
    except NotImplementedError:  # a class without get_config
        return f"{type(keras_model).__name__} is a class without get_config, so Keras cannot rebuild it"
    return CallbackModelSpec(ClassSpec(f"{__name__}.{FromConfig.__qualname__}", {"config": config}), ("keras",), {})


def _named(key: str) -> str:
    return f"eval/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"
