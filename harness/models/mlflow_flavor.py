"""Load a published checkpoint as a model: `load_model`, and MLflow's entry point for ``python_function``.

    MLmodel (or the run's own model spec) -> class -> `described_model` builds it -> safetensors -> eval mode

Nothing is unpickled.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import safe_open
from torch import Tensor, nn

from harness.checkpoint.format.commit import MANIFEST
from harness.checkpoint.format.index import CheckpointIndex
from harness.checkpoint.format.names import NamedState, named_state, some
from harness.checkpoint.format.verify import require_whole
from harness.checkpoint.restore.locate import is_in_mlflow
from harness.config.instantiate import load_class
from harness.data import rng_state
from harness.errors import CheckpointError, ConfigError
from harness.models.described_model import DescribedModel
from harness.models.model_spec import as_array, call, named_outputs
from harness.models.trusted_classes import TrustedClasses
from harness.tracking.mlflow.mlmodel import FLAVOR, MLMODEL, newest_model_spec, read_model_spec

# The names that `mlflow models serve` and `mlflow.pyfunc.load_model` trust, separated by commas.
TRUSTED_VARIABLE = "HARNESS_TRUSTED"


def load_model(
    where: str | Path,
    *,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    trusted: Sequence[str] = (),
) -> nn.Module:
    """Load the model of a checkpoint, in eval mode.

    Imports the class that the model spec names, which runs its module's code, and calls it with the spec's arguments.
    The class is a `torch.nn.Module`, or a `harness.Task` that constructs one.

    Effects: not collective; any thread; blocks until all files are read, and verified if there is a manifest. Downloads
    a model in MLflow to MLflow's directory first. Preserves random states.

    Args:
        where: an address in MLflow (``models:/<id>``, ``models:/<name>@best``, ``runs:/...``), the directory of a
            downloaded model, or that of a checkpoint within its run's directory.
        device: device of the returned model.
        model: the model to fill, instead of one from the model spec. Nothing is imported then.
        trusted: packages, modules or classes that the arguments may name beside ``torch.nn`` and the top-level package
            of the model's class.

    Raises:
        ConfigError: if there is no model, the spec has no class, the class cannot be imported or built, or the class
            or an argument is not allowed.
        CheckpointError: if the weights are damaged, or differ from the model in names, shapes or ties.
    """
    directory = _directory(str(where))
    if model is None:
        before = rng_state.capture(torch.device("cpu"))
        try:
            spec, untrusted_dirs = _read_spec(str(where), directory)
            model = _build(str(where), untrusted_dirs, spec, trusted)
        finally:
            rng_state.restore(before, torch.device("cpu"))
    _fill(model, directory)
    return model.to(device).eval()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyFuncModel:
    """Entry point of ``mlflow.pyfunc.load_model`` and ``mlflow models serve``."""
    # Choose the device as `mlflow.pytorch` does.
    chosen = (model_config or {}).get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
    device = torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
    # From the server's environment: the untrusted MLmodel file can set `model_config`.
    trusted = [name.strip() for name in os.environ.get(TRUSTED_VARIABLE, "").split(",") if name.strip()]
    return PyFuncModel(load_model(path, device=device, trusted=trusted))


class PyFuncModel:
    """Wraps a model, in eval mode, in MLflow's interface: arrays in, arrays out."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    def get_raw_model(self) -> nn.Module:
        """Return the torch module."""
        return self._model

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Run the model on one batch; `params` are ignored.

        `data` is the model's only argument: an array, a tensor, a DataFrame of numbers, or lists of them. A mapping has
        the arguments by name. Floating-point numbers are cast to the dtype of the weights.

        Returns:
            An array, or name -> array if the model returns several tensors.
        """
        is_named = isinstance(data, Mapping)
        values: Mapping[str, Any] = data if is_named else {"input": data}
        inputs = {str(name): self._tensor(value) for name, value in values.items()}
        with torch.inference_mode():
            outputs = named_outputs(call(self._model, inputs, is_named=is_named))
        arrays = {name: as_array(tensor) for name, tensor in outputs.items()}
        return arrays["output"] if list(arrays) == ["output"] else arrays

    def _tensor(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.from_numpy(_numbers(value))
        dtype = self._dtype if value.is_floating_point() else None
        converted: Tensor = value.to(self._device, dtype)
        return converted


def _numbers(value: Any) -> np.ndarray[Any, Any]:
    """Copy to a writable array, as torch requires."""
    array = np.array(value)
    if array.dtype == object:
        # A column of lists, which is how MLflow stores arrays in cells.
        cells = array.reshape(len(array), -1)
        array = np.stack([np.stack([np.asarray(cell) for cell in row]) for row in cells])
        array = array[:, 0] if cells.shape[1] == 1 else array
    if array.dtype.kind not in "biufc":
        raise ValueError(f"the model's input must be numbers, got {array.dtype}")
    return array


def _directory(where: str) -> Path:
    if is_in_mlflow(where):
        from harness.tracking.mlflow.artifacts import download

        return download(where)
    if not Path(where).is_dir():
        raise ConfigError(
            "", f"{where}: is not a directory; use that of a checkpoint, or an address in MLflow (models:/...)"
        )
    return Path(where)


def _read_spec(where: str, directory: Path) -> tuple[Mapping[str, Any], Sequence[Path]]:
    """Read the spec from the MLmodel file or the run's outbox; return it and the directories with untrusted code."""
    run_dir = directory.absolute().parent.parent
    try:
        if (directory / MLMODEL).exists():
            return dict(yaml.safe_load((directory / MLMODEL).read_text())["flavors"][FLAVOR]), (directory,)
        if (directory / MANIFEST).exists() and (name := newest_model_spec(run_dir / "outbox")) is not None:
            # The checkpoint's directory is listed too, since it may be a link to another place.
            return read_model_spec(run_dir / "outbox", name), (directory, run_dir)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError("", f"{where}: the model spec cannot be read: {error!r}") from error
    raise ConfigError("", f"{where}: has no model spec; pass the model to fill, with model=")


def _build(where: str, untrusted_dirs: Sequence[Path], spec: Mapping[str, Any], trusted: Sequence[str]) -> nn.Module:
    class_path = spec.get("class_path")
    if not isinstance(class_path, str):
        raise ConfigError(
            "",
            f"{where}: the model spec of this {spec.get('model_class')} has no class; pass the model to fill, with "
            "model=, or name its class in training, with PeriodicLogger.describe",
        )
    _add_working_directory(class_path)
    key = f"{where}: task"
    classes = TrustedClasses(class_path, untrusted_dirs, trusted)
    classes.require_outside(f"{key}.class_path", class_path)
    found = load_class(key, class_path)
    classes.require_model(key, class_path, found)
    built = DescribedModel(classes).build(f"{key}.init_args", found, spec.get("init_args", {}))
    model = built if isinstance(built, nn.Module) else built.model()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{key}.class_path", f"{class_path}.model() returns {type(model).__name__}, not a torch.nn.Module"
        )
    return model


def _add_working_directory(class_path: str) -> None:
    """Append the working directory, which MLflow's commands omit, to ``sys.path`` if the class's package is missing."""
    package = class_path.partition(".")[0]
    if package and importlib.util.find_spec(package) is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _fill(model: nn.Module, directory: Path) -> None:
    """Copy the stored weights into the model, reading each tensor once."""
    if (directory / MANIFEST).exists():
        require_whole(directory, weights_only=True)
    stored, state = CheckpointIndex.of_weights(directory), named_state(model)
    _check_names(stored, state)
    by_file: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in {**state.parameters, **state.buffers}.items():
        place = stored.model[stored.name_of(name)]
        if place.tensor.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{name}: has shape {list(place.tensor.shape)} in {directory} and {list(tensor.shape)} in the model"
            )
        by_file.setdefault(place.file, []).append((stored.name_of(name), tensor))
    with torch.no_grad():
        for file, tensors in by_file.items():
            with safe_open(directory / file, framework="pt") as reader:
                for name, tensor in tensors:
                    tensor.copy_(reader.get_tensor(name))


def _check_names(stored: CheckpointIndex, state: NamedState) -> None:
    own = {**state.parameters, **state.buffers}
    missing = [name for name in own if stored.name_of(name) not in stored.model]
    # A tied tensor must have a single entry in the file; two entries may differ.
    apart = [
        f"{alias} and {name}" for alias, name in state.aliases.items() if stored.name_of(alias) != stored.name_of(name)
    ]
    taken = {stored.name_of(name) for name in (*own, *state.aliases)}
    unexpected = [name for name in stored.model if name not in taken]
    problems = [
        *([f"has no {some(missing)}"] if missing else []),
        *([f"has {some(unexpected)}, which the model lacks"] if unexpected else []),
        *([f"has separate {some(apart)}, which are tied in the model"] if apart and not missing else []),
    ]
    if problems:
        raise CheckpointError(f"{stored.checkpoint}: {', and '.join(problems)}; it belongs to another model")
