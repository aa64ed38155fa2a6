"""Find shards without a strategy, with DDP, FSDP2 and HSDP: parameters and moments are tensors or DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.layout import Section
from harness.checkpoint.format.names import NamedState
from harness.checkpoint.format.tensor_shard import (
    TensorShard,
    full_range,
    number_spec,
    scalar_range,
    shard_of,
    spec_of,
)
from harness.checkpoint.sharding.dtensor import ranges_of
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    innermost,
    name_of,
    names_by_id,
    state_error,
    trained_ids,
)
from harness.checkpoint.sharding.state_form import Leaf
from harness.errors import CheckpointError


def find(state: NamedState, optimizer: Any, selection: Selection, sharded_modules: tuple[Any, ...]) -> LocalShards:
    """Find this rank's shards of a model of tensors and DTensors, and of its optimizer."""
    shards = LocalShards.of_model(state, sharded_modules)
    inner = innermost(optimizer)
    trained = trained_ids(list(state.parameters.values()), inner)
    for name, parameter in state.parameters.items():
        is_volatile = id(parameter) not in trained
        shards.tensors.append(
            _shard("model", name, parameter, state.holders[name], selection.dtype, is_volatile=is_volatile)
        )
    add_buffers(shards, state, selection)
    if inner is None:
        return shards
    names = names_by_id(state)
    if not selection.weights_only:
        _refuse_state_outside_groups(inner, names)
    shards.members.append((inner.__dict__, "state", inner.state))
    shards.sizes.append((inner.state, len(inner.state)))
    shards.sizes.append((inner.param_groups, len(inner.param_groups)))
    for index, group in enumerate(inner.param_groups):
        in_group = [name_of(parameter, names, index) for parameter in group["params"]]
        shards.groups.append((group, in_group))
        shards.sizes.append((group["params"], len(in_group)))
        if selection.weights_only:
            continue
        for parameter, name in zip(group["params"], in_group, strict=True):
            values = inner.state.get(parameter)
            if values is None:
                continue
            shards.members.append((inner.state, parameter, values))
            for leaf in shards.add_state(inner, [name], values, parameter):
                shards.tensors.append(_state_shard(inner, name, leaf, parameter))
    return shards


def _refuse_state_outside_groups(inner: Any, names: Mapping[int, str]) -> None:
    """Refuse state of a tensor in no parameter group.

    An exception is state that Adagrad creates in its constructor: FSDP2 then replaces the parameters by DTensors, and
    no step reads the state of the replaced tensors.
    """
    listed = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    are_replaced = any(isinstance(parameter, DTensor) for group in inner.param_groups for parameter in group["params"])
    for key, values in inner.state.items():
        if are_replaced and not isinstance(key, DTensor) and id(key) not in names:
            continue
        if isinstance(key, Tensor) and id(key) not in listed and values:
            what = names.get(id(key)) or f"a tensor of shape {tuple(key.shape)}"
            kinds = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
            raise CheckpointError(
                f"{type(inner).__name__}: has state ({kinds}) of {what}, which is in no parameter group, so it cannot "
                "be saved; add it to a group, delete its state, or use checkpoint.save_weights_only"
            )


def find_optimized(optimizer: Any, names: dict[int, str]) -> list[OptimizedTensor]:
    """List the parameters in the optimizer's groups, including frozen ones, which may be trained later."""
    inner = innermost(optimizer)
    return [
        OptimizedTensor(group, parameter, [name_of(parameter, names, index)])
        for index, group in enumerate(inner.param_groups)
        for parameter in group["params"]
    ]


def _state_shard(optimizer: Any, name: str, leaf: Leaf, parameter: Tensor) -> TensorShard:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        return shard_of(number_spec("optimizer", full_name, value), place, scalar_range(), is_volatile=True)
    if value.ndim and isinstance(parameter, DTensor) and not isinstance(value, DTensor) and _is_sharded(parameter):
        raise state_error(optimizer, leaf.name, name, "a plain tensor, though the parameter is sharded")
    return _shard("optimizer", full_name, value, place, None, is_volatile=leaf.is_made)


def _is_sharded(parameter: DTensor) -> bool:
    return any(not placement.is_replicate() for placement in parameter.placements)


def add_buffers(shards: LocalShards, state: NamedState, selection: Selection) -> None:
    """Add the buffers. Rank 0 writes them, as DDP and our evaluation broadcast its own; every rank restores them."""
    is_writer = selection.is_main_process or selection.restoring
    for name, buffer in state.buffers.items():
        shard = _shard("model", name, buffer, state.holders[name], selection.dtype, is_volatile=True)
        if not is_writer and not isinstance(buffer, DTensor):
            shard = replace(shard, ranges=())
        shards.tensors.append(shard)


def _shard(
    section: Section, name: str, value: Tensor, place: tuple[Any, Any], dtype: torch.dtype | None, *, is_volatile: bool
) -> TensorShard:
    spec = spec_of(section, name, value, tuple(value.shape), dtype)
    ranges = ranges_of(name, value) if isinstance(value, DTensor) else full_range(value)
    return shard_of(spec, place, ranges, is_volatile=is_volatile)
