"""`HarnessCallback` for Keras 3 with its torch backend: a run in MLflow, and checkpoints in safetensors.

    model.fit(x, y, epochs=20, callbacks=[HarnessCallback(every_n_epochs=5)])

Keras makes names up as it goes (``dense_3``), and others when a model is built again. So a checkpoint has names of its
own: ``<layer>.<variable>``, and ``<slot>.<layer>.<variable>`` for what the optimizer keeps of it, in Keras's words
(``momentum``, ``velocity``); ``step`` is the number of its steps, and ``iteration`` that of batches, where it
accumulates several for a step.
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

    Effects: main thread. Leaves ``<run_dir>/<run_name>/``.

    Args:
        every_n_epochs: a checkpoint each so many epochs; None: not by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: of the run's directory and the MLflow run; None: made up. A run of this name goes on, if `fit` does:
            from the optimizer's count of steps and ``initial_epoch``, which `keras.callbacks.BackupAndRestore` has.
        run_dir: the directory that the runs' directories are in.
        checkpoint: everything else about checkpoints.
        tracking: everything else about tracking.
        params: parameters to log beside the optimizer's.
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
        super().__init__()
        self._guest = CallbackBase(
            CallbackOptions(
                every_n_epochs, experiment_name, run_name, run_dir, checkpoint, tracking, params, input_example
            )
        )
        self._optimizer: _Optimizer | None = None
        # Batches that the optimizer has had, in all; of the epoch that runs.
        self._num_batches = self._in_epoch = 0
        self._is_left = False
        # Of the epoch, if its length is known: its end may have another already, by a callback before this one.
        self._rate: float | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Another training begins; the one before may have been left by an error, of which `fit` tells nobody."""
        CallbackBase.end_what_was_left()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """An epoch begins; with the first, training: only now it is known which one that is."""
        if not self._guest.is_open:
            self._begin(epoch)
        self._in_epoch, self._is_left, self._rate = 0, False, None
        self._guest.begin_epoch()

    def _begin(self, epoch: int) -> None:
        model = Weights(self.model)
        self._optimizer = _Optimizer(self.model.optimizer, model)
        self._num_batches = self._optimizer.num_batches
        step = self._optimizer.steps_of(self._num_batches)
        _check_count(self._guest.options, epoch, step)
        self._guest.begin(
            Accelerator(cpu=model.device.type == "cpu"),
            model,
            self._optimizer,
            None,
            completed=(epoch, step),
            params={"optimizer": self.model.optimizer.get_config(), "fit": dict(self.params)},
            recipe=_recipe(self.model),
        )

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """A batch is done, or as many as are executed at once."""
        assert self._optimizer is not None
        self._optimizer.follow()
        self._num_batches += batch + 1 - self._in_epoch
        self._in_epoch = batch + 1
        if self._optimizer.may_skip:
            self._num_batches = self._optimizer.num_batches
        is_last = self._in_epoch == self.params["steps"]
        self._is_left = self.model.stop_training and not is_last
        if is_last:
            self._rate = self._optimizer.rate
        try:
            self._guest.batch_done(0, is_loaders_last=is_last, step=self._optimizer.steps_of(self._num_batches))
        except Stopped as stopped:
            raise self._guest.fail(stopped) from None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """An epoch is over, and evaluated."""
        assert self._optimizer is not None
        values = {_named(key): value for key, value in (logs or {}).items()}
        self._guest.report({**values, "train/lr": self._optimizer.rate if self._rate is None else self._rate})
        stops = self.model.stop_training
        # Where the length is known, a callback behind this one may have asked for the end within the epoch too.
        is_left = self._is_left or (stops and self._in_epoch < (self.params["steps"] or 0))
        self._guest.end_epoch(is_whole=not is_left, is_last=stops or epoch + 1 == self.params["epochs"])

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """An evaluation is over; one within `fit` is the epoch's, and comes with its end."""
        if not self._guest.is_open:
            self._guest.report({f"test/{key}": value for key, value in (logs or {}).items()})

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Training is complete."""
        if self._guest.is_open:
            self._guest.end()


class Weights(nn.Module):
    """The variables of a Keras model under names that are the same whenever it is built.

    Args:
        keras_model: built.

    Attributes:
        keras_model: the model itself.

    Raises:
        ConfigError: if it is not built, so that it has no variables yet.
    """

    keras_model: Any

    def __init__(self, keras_model: Any) -> None:
        super().__init__()
        if not keras_model.built:
            raise ConfigError("", "the Keras model is not built; give it an Input, or call it once")
        # Not as a submodule: its variables would stand here twice.
        object.__setattr__(self, "keras_model", keras_model)
        self.names: dict[str, str] = {}
        for name, variable in _named_variables(keras_model):
            self._parameters[name] = variable.value
            self.names[variable.path] = name

    @property
    def device(self) -> torch.device:
        """Where the variables are."""
        return next((tensor.device for tensor in self._parameters.values() if tensor is not None), torch.device("cpu"))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives, as in inference unless the module is in training mode."""
        return self.keras_model(*args, training=self.training, **kwargs)


class FromConfig:
    """Makes the model of a published checkpoint from its configuration, for `harness.load_model`.

    Args:
        config: of the model, as ``to_json`` gives it.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    def model(self) -> nn.Module:
        """With weights of its own."""
        return Weights(keras.models.model_from_json(self.config))


def load_model(where: str | Path) -> Any:
    """Load the Keras model of a checkpoint.

    Args, Raises: as `harness.load_model`, which gives a `Weights` around it.
    """
    return mlflow_flavor.load_model(where).keras_model


class _Optimizer:
    """A Keras optimizer as the engine knows optimizers: ``param_groups``, and ``state`` by parameter.

    Keras steps it without torch's hooks, so a checkpoint is copied before training goes on, and not beside it.

    Attributes:
        may_skip: a batch may be none for it: where the scaled loss has overflowed.
    """

    def __init__(self, optimizer: Any, weights: Weights) -> None:
        self._own = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
        self._trained = list(weights.keras_model.trainable_variables)
        self._accumulation = int(self._own.gradient_accumulation_steps or 1)
        # Of batches; `iterations` is of steps, and a tensor made anew each time where gradients are accumulated.
        self._iteration = next(each.value for each in self._own.variables if each.name == "iteration")
        self._counts = {"step": self._iteration}
        if self._accumulation > 1:
            self._counts = {"step": torch.empty_like(self._iteration), "iteration": self._iteration}
        self.may_skip = self._own is not optimizer
        self.state: dict[Any, dict[str, Any]] = {}
        self.param_groups: list[dict[str, Any]] = [{"params": [variable.value for variable in self._trained]}]
        self.follow()

    @property
    def num_batches(self) -> int:
        """Batches that it has had, also those whose gradients wait for the rest of their step; waits for the device."""
        return int(self._iteration)

    def steps_of(self, num_batches: int) -> int:
        """Optimizer steps that are complete with so many batches."""
        return num_batches // self._accumulation

    @property
    def rate(self) -> float:
        """The learning rate now."""
        return float(self._own.learning_rate)

    def follow(self) -> None:
        """After a batch: count its steps, on the device; find its variables, which it makes with the first."""
        if self._accumulation > 1:
            torch.div(self._iteration, self._accumulation, rounding_mode="floor", out=self._counts["step"])
        if self.state or not self._own.built:
            return
        prefixes = {variable.path.replace("/", "_") + "_": variable for variable in self._trained}
        for slot in self._own.variables:
            # The longest: the name of a variable may begin with another's.
            prefix = max((each for each in prefixes if slot.name.startswith(each)), key=len, default=None)
            if prefix is not None:
                kinds = self.state.setdefault(prefixes[prefix].value, dict(self._counts))
                kinds[slot.name.removeprefix(prefix)] = slot.value


def _named_variables(keras_model: Any) -> list[tuple[str, Any]]:
    """``<layer>.<variable>``; where a layer has several of a name, with the place in the layer: ``mha.2.kernel``."""
    found: dict[int, tuple[str, Any]] = {}
    for layer in (*keras_model.layers, keras_model):
        own = [variable for variable in layer.variables if id(variable) not in found]
        counts = Counter(variable.name for variable in own)
        for place, variable in enumerate(own):
            number = f"{place}." if counts[variable.name] > 1 else ""
            at = "" if layer is keras_model else f"{layer.name}."
            found[id(variable)] = (f"{at}{number}{variable.name}", variable)
    return list(found.values())


def _check_count(options: CallbackOptions, epoch: int, step: int) -> None:
    """Refuse a second `fit` that counts its epochs anew: the names of its checkpoints are there already.

    Raises:
        ConfigError: with what to give it.
    """
    if options.run_name is None:
        return
    for name, manifest in list_checkpoints(Path(options.run_dir) / options.run_name / "checkpoints")[::-1]:
        if manifest.step <= step and manifest.epoch > epoch:
            raise ConfigError(
                "HarnessCallback",
                f"fit begins at epoch {epoch}, with an optimizer that has taken {step} steps, and {options.run_name} "
                f"has {name} of step {manifest.step} already; give fit initial_epoch={manifest.epoch}, or the callback "
                "another run_name",
            )


def _recipe(keras_model: Any) -> CallbackModelSpec | str:
    try:
        config = keras_model.to_json()
    except NotImplementedError:  # a model that is written as a class, without get_config
        return f"{type(keras_model).__name__} is a class without get_config, so that Keras cannot build it again"
    return CallbackModelSpec(ClassSpec(f"{__name__}.{FromConfig.__qualname__}", {"config": config}), ("keras",), {})


def _named(key: str) -> str:
    return f"eval/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"
