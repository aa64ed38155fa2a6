"""From a published checkpoint back to a model: `load_model`, and what MLflow calls for ``python_function``.

    MLmodel (or the run's own recipe) -> the class that it names -> safetensors into it -> eval mode

Nothing is unpickled. The class is one that can be imported here, and is built only if it is a `torch.nn.Module`, or a
`harness.Task`, which makes one. `harness.models.described_model` builds it from the arguments.
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

# What `mlflow models serve` and `mlflow.pyfunc.load_model` trust, with commas between.
TRUSTED_VARIABLE = "HARNESS_TRUSTED"


def load_model(
    where: str | Path,
    *,
    device: str | torch.device = "cpu",
    model: nn.Module | None = None,
    trusted: Sequence[str] = (),
) -> nn.Module:
    """Load the model of a checkpoint, in eval mode.

    The class that the model names is imported, which runs the code of its module. Its constructor is called with the
    arguments that the model names.

    Effects: not collective; any thread; blocks until all is read, and checked against its digests where it has a
    manifest; from MLflow it is downloaded first, to where MLflow keeps such files. Random numbers are as before.

    Args:
        where: an address in MLflow (``models:/<id>``, ``models:/<name>@best``, ``runs:/...``), a downloaded model's
            directory, or a checkpoint's in its run's directory.
        device: where the model shall be.
        model: the model to fill, instead of one built by the class that was named for it. Nothing is imported then.
        trusted: packages, modules or classes that the arguments may name beside ``torch.nn`` and the top-level package
            of the model's class.

    Raises:
        ConfigError: if no class was named, or it cannot be imported or built, or it or an argument is of a class that
            a model may not name.
        CheckpointError: if the weights are damaged, or are of another model: a name is missing or too many, a shape
            or a tie is another.
    """
    directory = _directory(str(where))
    if model is None:
        before = rng_state.capture(torch.device("cpu"))
        try:
            recipe, came_with = _recipe(str(where), directory)
            model = _build(str(where), came_with, recipe, trusted)
        finally:
            rng_state.restore(before, torch.device("cpu"))
    _fill(model, directory)
    return model.to(device).eval()


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PyFuncModel:
    """What ``mlflow.pyfunc.load_model`` and ``mlflow models serve`` call."""
    # As `mlflow.pytorch` has it.
    chosen = (model_config or {}).get("device") or os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE")
    device = torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))
    # From the environment of who serves it: `model_config` can be set in the MLmodel file itself.
    trusted = [name.strip() for name in os.environ.get(TRUSTED_VARIABLE, "").split(",") if name.strip()]
    return PyFuncModel(load_model(path, device=device, trusted=trusted))


class PyFuncModel:
    """A model as MLflow calls it: arrays in, arrays out.

    Args:
        model: in eval mode, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        tensors = [*model.parameters(), *model.buffers()]
        self._device = tensors[0].device if tensors else torch.device("cpu")
        self._dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)

    def get_raw_model(self) -> nn.Module:
        """The model itself."""
        return self._model

    def predict(self, data: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Run the model on one batch.

        Args:
            data: an array, a tensor, a DataFrame of numbers, or lists of them: the model's only argument. A mapping
                of such: its arguments by name. Floating-point numbers are cast to the type of the weights.
            params: none are known.

        Returns:
            An array; where the model gives several tensors, name -> array.
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
    """As an array of its own that can be written to, which torch asks for."""
    array = np.array(value)
    if array.dtype == object:
        # A column of lists: MLflow's way to have an array in a cell.
        cells = array.reshape(len(array), -1)
        array = np.stack([np.stack([np.asarray(cell) for cell in row]) for row in cells])
        array = array[:, 0] if cells.shape[1] == 1 else array
    if array.dtype.kind not in "biufc":
        raise ValueError(f"the model takes numbers, got {array.dtype}")
    return array


def _directory(where: str) -> Path:
    if is_in_mlflow(where):
        from harness.tracking.mlflow.artifacts import download

        return download(where)
    if not Path(where).is_dir():
        raise ConfigError("", f"{where}: is no directory; give a checkpoint's, or an address in MLflow (models:/...)")
    return Path(where)


def _recipe(where: str, directory: Path) -> tuple[Mapping[str, Any], Sequence[Path]]:
    """Read what the model is built by: MLflow's file, or for a checkpoint in its run's directory the run's own.

    Returns:
        The recipe, and the directories that came with it.
    """
    run_dir = directory.absolute().parent.parent
    try:
        if (directory / MLMODEL).exists():
            return dict(yaml.safe_load((directory / MLMODEL).read_text())["flavors"][FLAVOR]), (directory,)
        if (directory / MANIFEST).exists() and (name := newest_model_spec(run_dir / "outbox")) is not None:
            # The checkpoint's own directory too: it may be a link to elsewhere.
            return read_model_spec(run_dir / "outbox", name), (directory, run_dir)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError("", f"{where}: how its model is built cannot be read: {error!r}") from error
    raise ConfigError("", f"{where}: does not say how its model is built; give the model to fill, with model=")


def _build(where: str, came_with: Sequence[Path], recipe: Mapping[str, Any], trusted: Sequence[str]) -> nn.Module:
    class_path = recipe.get("class_path")
    if not isinstance(class_path, str):
        raise ConfigError(
            "",
            f"{where}: is of a {recipe.get('model_class')}, and no class was named to build it by; give the model to "
            "fill, with model=, or name one in training, with PeriodicLogger.describe",
        )
    _find_from_here(class_path)
    key = f"{where}: task"
    classes = TrustedClasses(class_path, came_with, trusted)
    classes.require_outside(f"{key}.class_path", class_path)
    found = load_class(key, class_path)
    classes.require_model(key, class_path, found)
    made = DescribedModel(classes).build(f"{key}.init_args", found, recipe.get("init_args", {}))
    model = made if isinstance(made, nn.Module) else made.model()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{key}.class_path", f"{class_path}.model() gives {type(model).__name__}, no module")
    return model


def _find_from_here(class_path: str) -> None:
    """Let what is in the directory that one starts from be found, behind all else: MLflow's commands do not look."""
    package = class_path.partition(".")[0]
    if package and importlib.util.find_spec(package) is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _fill(model: nn.Module, directory: Path) -> None:
    """Read the weights into the model, each of its tensors once.

    Raises:
        CheckpointError: if they are damaged, or of another model.
    """
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
    # What is one tensor in the model and two in the file has two values.
    apart = [
        f"{alias} and {name}" for alias, name in state.aliases.items() if stored.name_of(alias) != stored.name_of(name)
    ]
    taken = {stored.name_of(name) for name in (*own, *state.aliases)}
    unexpected = [name for name in stored.model if name not in taken]
    problems = [
        *([f"has no {some(missing)}"] if missing else []),
        *([f"has {some(unexpected)}, which the model has not"] if unexpected else []),
        *([f"has {some(apart)} apart, which are tied in the model"] if apart and not missing else []),
    ]
    if problems:
        raise CheckpointError(f"{stored.checkpoint}: {', and '.join(problems)}; it is of another model")
