"""What a tensor is called in a checkpoint: its path in the user's own model, without any wrapper.

A wrapper is recognised by its class, not by the name of its attribute: a user's own submodule that is
called ``module`` keeps its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

# Class name -> the attribute under which it holds what it wraps. By name, so that none is imported.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}


def _wrapped_attribute(module: nn.Module) -> str | None:
    # FSDP2 makes a subclass on the fly, so look at the bases too.
    for base in type(module).__mro__:
        if base is nn.Module:
            return None
        if base.__name__ in _WRAPPERS:
            return _WRAPPERS[base.__name__]
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's own module inside any number of wrappers at the top."""
    while (attribute := _wrapped_attribute(module)) is not None:
        module = getattr(module, attribute)
    return module


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    yield prefix, module
    # Not named_children(), which leaves out a module that stands a second time: it has aliases.
    for name, child in module._modules.items():
        if child is not None:
            yield from _modules(child, f"{prefix}{name}.")


@dataclass(frozen=True)
class NamedState:
    """The tensors of a model's state, each once.

    Args:
        parameters: name -> parameter, in the order of the model.
        buffers: name -> persistent buffer.
        aliases: further name -> the name under which the same tensor stands above (tied weights).
    """

    parameters: Mapping[str, nn.Parameter]
    buffers: Mapping[str, Tensor]
    aliases: Mapping[str, str]


def named_state(model: nn.Module) -> NamedState:
    """Name every parameter and persistent buffer of a model, wrapped or not.

    Effects: not collective; any thread, outside of forward; reads only.
    """
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for prefix, module in _modules(model):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (first := first_name.setdefault(id(parameter), prefix + name)) == prefix + name:
                parameters[first] = parameter
            else:
                aliases[prefix + name] = first
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name in module._non_persistent_buffers_set:
                continue
            if (first := first_name.setdefault(id(buffer), prefix + name)) == prefix + name:
                buffers[first] = buffer
            else:
                aliases[prefix + name] = first
    return NamedState(parameters, buffers, aliases)
