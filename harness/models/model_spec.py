"""Make the model spec: class, arguments, signature and packages of a run's models, as JSON values.

The trainer makes it once, without importing mlflow. The publisher writes it to MLmodel files
(`harness.tracking.mlflow.mlmodel`), and `harness.models.mlflow_flavor` builds the model from it.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from harness.checkpoint.format.names import is_fsdp1, unwrapped
from harness.config.instantiate import check_arguments
from harness.config.schema import ClassSpec
from harness.data import rng_state
from harness.errors import ConfigError
from harness.io.redact import redact_tree

# A batch of the model's input, or of several inputs by argument name.
Example = Tensor | np.ndarray[Any, Any] | Mapping[str, Tensor | np.ndarray[Any, Any]]
# An example, or a function that returns one.
ExampleSource = Example | Callable[[], Example] | None

_PACKAGES = ("mlflow", "harness", "torch", "safetensors", "numpy", "accelerate")


def check_spec(key: str, spec: ClassSpec) -> None:
    """Refuse a class that another process cannot import, and arguments that are invalid or not JSON.

    Raises:
        ConfigError: with the place and the reason.
    """
    if spec.class_path.startswith("__main__."):
        raise ConfigError(
            f"{key}.class_path", f"{spec.class_path} can only be imported by this script; move the class to a module"
        )
    try:
        json.dumps(dict(spec.init_args))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}.init_args", f"must be numbers, text, lists or mappings: {error}") from error
    check_arguments(key, spec)


def make_model_spec(spec: ClassSpec | None, model: nn.Module, packages: Sequence[str] = ()) -> dict[str, Any]:
    """Make the model spec, without the signature.

    `spec` is the class of the model or of its task, None if unknown; `packages` are required beside that of the class.

    Effects: not collective; any thread; reads the metadata of installed packages; writes nothing to disk.
    """
    found = type(unwrapped(model))
    requirements, notes = _requirements(spec, packages)
    return {
        "class_path": None if spec is None else spec.class_path,
        "init_args": {} if spec is None else redact_tree(dict(spec.init_args)),
        "model_class": f"{found.__module__}.{found.__qualname__}",
        "python": platform.python_version(),
        "requirements": requirements,
        "requirement_notes": notes,
    }


def infer_signature(
    model: nn.Module, example: ExampleSource, dynamic_axes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Any]:
    """Infer a model's inputs and outputs by running it on an example.

    Effects: not collective; one rank; main thread, outside of forward and backward. Runs the model once in eval mode
    without gradients, twice if axes are dynamic; restores modes, random states and buffers.

    Args:
        model: wrapped or not; not sharded.
        example: a batch, or a function that returns it; axis 0 is the samples.
        dynamic_axes: name of an input (``input`` for a single one) -> further axes of variable size.

    Returns:
        ``signature`` in MLflow's tensor schema, and ``example`` as nested lists.

    Raises:
        ValueError: if the model is sharded or lazy, the example is invalid, or the outputs are not tensors.
    """
    module = unwrapped(model)
    tensors = [*module.parameters(), *module.buffers()]
    is_sharded = any(isinstance(tensor, DTensor) or hasattr(tensor, "ds_id") for tensor in tensors)
    if is_sharded or any(map(is_fsdp1, model.modules())):
        raise ValueError("the model is already sharded; describe it before accelerator.prepare")
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError("the model has lazy parameters, whose shapes are unknown before its first batch")
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    modes = [(each, each.training) for each in module.modules()]
    before = rng_state.capture(device)
    try:
        example = example() if callable(example) else example
        if example is None:
            raise ValueError("there is no example")
        inputs = _by_name(example, device)
        free = {name: {0, *(dynamic_axes or {}).get(name, ())} for name in inputs}
        module.eval()
        outputs = _run(module, inputs, is_named=isinstance(example, Mapping))
        free_outputs: dict[str, set[int]] = {name: {0} for name in outputs}
        if dynamic_axes:
            smaller = _run(module, _narrowed(inputs, dynamic_axes), is_named=isinstance(example, Mapping))
            for name, one in outputs.items():
                other = smaller[name]
                free_outputs[name] |= {axis for axis in range(one.ndim) if one.shape[axis] != other.shape[axis]}
    finally:
        rng_state.restore(before, device)
        for each, mode in modes:
            each.training = mode
    signature = {"inputs": _specs(inputs, free), "outputs": _specs(outputs, free_outputs)}
    lists = {name: tensor.tolist() for name, tensor in inputs.items()}
    return {"signature": signature, "example": lists if isinstance(example, Mapping) else lists["input"]}


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Return a model's outputs by name: ``output`` for one tensor, ``output_0`` and so on for those of a tuple.

    Raises:
        ValueError: if no output is a tensor.
    """
    if isinstance(output, Tensor):
        return {"output": output}
    items: Any = output.items() if isinstance(output, Mapping) else ()
    if isinstance(output, (tuple, list)):
        items = ((f"output_{index}" if len(output) > 1 else "output", value) for index, value in enumerate(output))
    found = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if not found:
        raise ValueError(f"the model returns {type(output).__name__}, which contains no tensor")
    return found


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Copy to a NumPy array on the host, with dtypes that NumPy lacks, such as bfloat16, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if _numpy_name(tensor.dtype) == "float32" else tensor).numpy()


def call(model: nn.Module, inputs: Mapping[str, Tensor], *, is_named: bool) -> Any:
    """Call the model on one batch, by argument names or with its only argument."""
    return model(**inputs) if is_named else model(inputs["input"])


def _by_name(example: Example, device: torch.device) -> dict[str, Tensor]:
    values: Mapping[str, Any] = example if isinstance(example, Mapping) else {"input": example}
    tensors = {str(name): torch.as_tensor(value).to(device) for name, value in values.items()}
    for name, tensor in tensors.items():
        if not tensor.ndim:
            raise ValueError(f"{name}: an example must be a batch, with at least one axis")
    return tensors


def _run(module: nn.Module, inputs: Mapping[str, Tensor], *, is_named: bool) -> dict[str, Tensor]:
    # Forward may change buffers, so it runs on copies. inference_mode would break later training if the model caches a
    # tensor, such as a rotary table, in its first call.
    copies = {name: buffer.clone() for name, buffer in module.named_buffers()}
    arguments, names = (() if is_named else (inputs["input"],)), (dict(inputs) if is_named else {})
    with torch.no_grad():
        return named_outputs(torch.func.functional_call(module, copies, arguments, names))


def _narrowed(inputs: Mapping[str, Tensor], axes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Shorten each dynamic axis by one."""
    narrowed = dict(inputs)
    for name, each in axes.items():
        for axis in each:
            if name not in narrowed or not 0 < axis < narrowed[name].ndim or narrowed[name].shape[axis] < 2:
                raise ValueError(f"dynamic_axes: the example has no axis {axis} of at least 2 in {name!r}")
            narrowed[name] = narrowed[name].narrow(axis, 0, narrowed[name].shape[axis] - 1)
    return narrowed


def _specs(tensors: Mapping[str, Tensor], free: Mapping[str, set[int]]) -> list[dict[str, Any]]:
    """Return the format of ``mlflow.types.TensorSpec.to_dict``; a single tensor has no name."""
    specs = []
    for name, tensor in tensors.items():
        shape = [-1 if axis in free[name] else size for axis, size in enumerate(tensor.shape)]
        spec: dict[str, Any] = {
            "type": "tensor",
            "tensor-spec": {"dtype": _numpy_name(tensor.dtype), "shape": shape or [-1]},
        }
        specs.append(spec if list(tensors) in (["input"], ["output"]) else {"name": name, **spec})
    return specs


def _numpy_name(dtype: torch.dtype) -> str:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype.name
    except TypeError:
        return "float32"


def _requirements(spec: ClassSpec | None, packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the required packages in pip's format, and notes on those that pip cannot install."""
    names = [*_PACKAGES, *packages]
    module = None if spec is None else spec.class_path.partition(".")[0]
    if spec is not None and module != "harness":
        own = importlib.metadata.packages_distributions().get(str(module), ())
        names += own
        if not own:
            return _pinned(
                names, [f"{spec.class_path} is not in an installed package; add its directory to PYTHONPATH"]
            )
    return _pinned(names, [])


def _pinned(names: Sequence[str], notes: list[str]) -> tuple[list[str], list[str]]:
    lines = []
    for name in dict.fromkeys(names):
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        version = distribution.version.partition("+")[0]  # an index lacks local builds such as 2.13.0+cpu
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        url = _without_user(origin.get("url", ""))
        if not origin:
            lines.append(f"{name}=={version}")
        elif "vcs_info" in origin:
            lines.append(f"{name} @ {origin['vcs_info']['vcs']}+{url}@{origin['vcs_info']['commit_id']}")
        elif url.startswith(("http://", "https://")):
            lines.append(f"{name} @ {url}")
        else:
            # The same name on an index may be another package.
            notes.append(f"{name} {version} was installed from a directory; install it from there")
    return lines, notes


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
