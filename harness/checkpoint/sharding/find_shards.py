"""Find the shards of one model and its optimizer with the module of its strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.names import NamedState, is_fsdp1, modules_of, named_state, some
from harness.checkpoint.sharding import fsdp1, plain, zero
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    innermost,
    names_by_id,
)
from harness.errors import CheckpointError


class NamedModel(NamedTuple):
    """Hold the named tensors of one model, its FSDP1 units, and all its sharded modules including the units."""

    state: NamedState
    units: Sequence[fsdp1.Unit]
    sharded_modules: tuple[Any, ...]


def name_model(model: nn.Module, prefix: str = "", named_before: dict[int, str] | None = None) -> NamedModel:
    """Reshard a prepared model and name its tensors; see `named_state` for the arguments.

    Effects: not collective; main thread, between steps.

    Raises:
        CheckpointError: if the model has state that is neither a parameter nor a buffer, or as `named_state`.
    """
    _refuse_extra_state(model)
    units = fsdp1.units_of(model)
    sharded: tuple[Any, ...] = (*(module for module in model.modules() if isinstance(module, FSDPModule)), *units)
    for each in sharded:
        each.reshard()
    placeholders = [placeholder for unit in units for placeholder in unit.placeholders()]
    return NamedModel(named_state(model, placeholders, prefix, named_before), units, sharded)


def find_shards(model: nn.Module, optimizer: Any, selection: Selection, named: NamedModel) -> LocalShards:
    """Find the shards of a prepared model and its prepared optimizer (or None) on this rank.

    Effects: not collective; main thread, between steps; reads metadata only.

    Raises:
        CheckpointError: if the model or the optimizer has an unsupported structure.
    """
    state, units, sharded = named
    if units:
        shards: LocalShards = fsdp1.find(state, units, optimizer, selection, sharded)
    elif is_deepspeed_engine(model):
        shards = zero.find(state, model, optimizer, selection, sharded)
    elif any(hasattr(parameter, "ds_id") for parameter in state.parameters.values()):
        raise CheckpointError(
            "the model's parameters are partitioned by DeepSpeed, but the model is not its engine; pass what "
            "accelerator.prepare returned to watch()"
        )
    else:
        shards = plain.find(state, optimizer, selection, sharded)
    if shards.trees:
        shards.refuse_ambiguous(innermost(optimizer), state.others.values())
    return shards


def find_optimized(model: nn.Module, optimizer: Any, named: NamedModel) -> list[OptimizedTensor]:
    """List the tensors that the innermost optimizer steps on, in the same order on every rank.

    Effects, Raises: as `find_shards`.
    """
    state, units, _ = named
    if units:
        return fsdp1.find_optimized(optimizer, state, units)
    names = names_by_id(state)
    if is_deepspeed_engine(model):
        return zero.find_optimized(model, names)
    return plain.find_optimized(optimizer, names)


def is_deepspeed_engine(model: nn.Module) -> bool:
    """Return whether a model is a DeepSpeed engine, compiled or not, made by accelerate or Lightning."""
    return any(base.__name__ == "DeepSpeedEngine" for base in type(getattr(model, "_orig_mod", model)).__mro__)


def _refuse_extra_state(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for method in ("get_extra_state", "_save_to_state_dict"):
            if getattr(type(module), method) is not getattr(nn.Module, method):
                raise CheckpointError(
                    f"{name or 'the model'}: {type(module).__name__} keeps state that is neither a parameter nor a "
                    f"buffer, or keeps it in a form of its own ({method}), which cannot be saved; make it a buffer"
                )
    for prefix, module in modules_of(model):
        if not _has_own_state_dict(module) or any(map(is_fsdp1, module.modules())):
            continue  # state_dict() would gather FSDP1's shards, which is collective
        if more := _names_beyond_tensors(prefix, module):
            name, kind = prefix.rstrip(".") or "the model", type(module).__name__
            raise CheckpointError(
                f"{name}: the state_dict() of {kind} has {some(more)}, neither parameters nor buffers, which a "
                "checkpoint of the model would not have; make them buffers, keep them out of state_dict() (of a "
                "torchmetrics object: persistent(False)), or move the module out of the model"
            )


def _has_own_state_dict(module: nn.Module) -> bool:
    """Return whether a class, an instance attribute or a hook changes a module's `state_dict`."""
    is_overridden = type(module).state_dict is not nn.Module.state_dict or "state_dict" in vars(module)
    return is_overridden or bool(module._state_dict_hooks)


def _names_beyond_tensors(prefix: str, module: nn.Module) -> list[str]:
    """List the entries of a module's `state_dict` that are not its parameters or buffers under any name."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names, addresses = {name for name, _ in tensors}, {_address(tensor) for _, tensor in tensors}
    try:
        state = module.state_dict()
    except Exception as error:
        raise CheckpointError(
            f"{prefix.rstrip('.') or 'the model'}: the state_dict() of {type(module).__name__} fails, so its state "
            f"beside parameters and buffers is unknown: {error}; fix it, or move the module out of the model"
        ) from error
    return [
        f"{prefix}{key}"
        for key, value in state.items()
        if key not in names and not (isinstance(value, Tensor) and _address(value) in addresses)
    ]


def _address(tensor: Tensor) -> Any:
    """Return the address of a tensor's memory, or its `id` if it has none."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.data_ptr() or id(tensor)
