"""Name each tensor of a model by its path in the unwrapped model.

Wrappers are recognised by class name, not by attribute name, so a user's submodule called ``module`` keeps its name.
PEFT wrapping does not rename a model's tensors; adapter tensors are named next to the weight that they adapt:
``fc.weight``, ``fc.lora_A.default.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from harness.errors import CheckpointError

# Class name -> attribute with the wrapped module. Class names avoid importing the frameworks.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
# Wrappers that add tensors, which are named under the same path.
_ADAPTERS = {
    "PeftModel": "base_model",
    "BaseTuner": "model",
    "BaseTunerLayer": "base_layer",
    "AuxiliaryTrainingWrapper": "original_module",
}
# (module, name, placeholder) of a parameter that FSDP1 has moved into a flat parameter.
Placeholder = tuple[nn.Module, str, nn.Parameter]


def _attribute_of(module: nn.Module, table: Mapping[str, str]) -> str | None:
    # FSDP2 derives a subclass at run time, so the base classes are checked too.
    return next((table[base.__name__] for base in type(module).__mro__ if base.__name__ in table), None)


def is_fsdp1(module: nn.Module) -> bool:
    """Return whether `module` is an FSDP1 wrapper. The modules inside hold slices as parameters, or no parameters."""
    return _attribute_of(module, {"FullyShardedDataParallel": ""}) is not None


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the user's module inside any number of outer wrappers."""
    while (attribute := _attribute_of(module, _WRAPPERS)) is not None:
        module = getattr(module, attribute)
    return module


def modules_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield each unwrapped module with its name prefix, read-only. Modules that occur twice are yielded twice."""
    module = unwrapped(module)
    yield prefix, module
    adapted = _attribute_of(module, _ADAPTERS)
    # named_children() skips the second occurrence of a module, whose tensors need aliases there.
    for name, child in module._modules.items():
        if child is not None:
            yield from modules_of(child, prefix if name == adapted else f"{prefix}{name}.")


@dataclass(frozen=True)
class NamedState:
    """Hold the tensors of a model's state, each once.

    Args:
        parameters: name -> parameter, in module order.
        buffers: name -> persistent buffer.
        aliases: additional name of a tied tensor -> its first name, which may be in another model of the checkpoint.
        holders: name -> (module dictionary that contains the tensor, key).
        sizes: (module dictionary, length); a different length means that the model's structure has changed.
        members: (dictionary, key, value) of submodules and of entries that are None; compared in the same way.
        others: `id` -> name of parameters of other models in the checkpoint, which the optimizer may also train.
    """

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    holders: Mapping[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    sizes: tuple[tuple[Any, int], ...] = ()
    members: tuple[tuple[Any, Any, Any], ...] = ()
    others: Mapping[int, str] = field(default_factory=dict)


def named_state(
    model: nn.Module,
    placeholders: Sequence[Placeholder] = (),
    prefix: str = "",
    named_before: dict[int, str] | None = None,
) -> NamedState:
    """Name every parameter and persistent buffer of a model, wrapped or not.

    Effects: not collective; any thread, outside of forward; reads only.

    Args:
        model: wrapped or not.
        placeholders: one for each parameter inside FSDP1's flat parameters.
        prefix: prepended to each name.
        named_before: `id` -> name of the tensors of other models in the checkpoint; this model's tensors are added. A
            tensor that is already in it becomes an alias.

    Raises:
        CheckpointError: if two tensors would have the same name.
    """
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    holders: dict[str, tuple[dict[str, Any], str]] = {}
    sizes: list[tuple[Any, int]] = []
    members: list[tuple[Any, Any, Any]] = []
    first_name = {} if named_before is None else named_before
    placeholders_of: dict[int, dict[str, Any]] = {}
    for module, key, placeholder in placeholders:
        placeholders_of.setdefault(id(module), {})[key] = placeholder
    for path, module in modules_of(model, prefix):
        sizes.append((module._modules, len(module._modules)))
        members += [(module._modules, key, child) for key, child in module._modules.items()]
        sizes += [(holder, len(holder)) for holder in (module._parameters, module._buffers)]
        tables: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (module._parameters, parameters),
            (module._buffers, buffers),
            (placeholders_of.get(id(module), {}), parameters),
        )
        for holder, into in tables:
            for key, tensor in holder.items():
                if tensor is None:
                    members.append((holder, key, None))
                if tensor is None or (into is buffers and key in module._non_persistent_buffers_set):
                    continue
                if getattr(tensor, "_is_flat_param", False):
                    continue  # its parts are in `placeholders`
                name = path + key
                if (first := first_name.setdefault(id(tensor), name)) != name:
                    aliases[name] = first
                elif name in holders and holders[name][0] is not holder:
                    raise CheckpointError(f"{name}: two tensors of the model would have this name; rename one of them")
                else:
                    into[name], holders[name] = tensor, (holder, key)
    for alias in aliases:
        if alias in holders:
            raise CheckpointError(f"{alias}: two tensors of the model would have this name; rename one of them")
    return NamedState(parameters, buffers, aliases, holders, tuple(sizes), tuple(members))


def some(names: Sequence[str], limit: int = 3) -> str:
    """Format the first `limit` names and the number of the others, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{more}"
