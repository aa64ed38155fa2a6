"""Single process, DDP, FSDP2, HSDP: parameters and moments are tensors or DTensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.layout import Section
from harness.checkpoint.format.names import NamedState
from harness.checkpoint.format.tensor_shard import TensorShard, number_spec, source_of, spec_of, whole, whole_number
from harness.checkpoint.sharding.dtensor import runs_of
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    innermost,
    name_of,
    names_by_id,
    refuse_state,
    state_leaves,
    trained_ids,
)
from harness.checkpoint.sharding.state_form import Leaf
from harness.errors import CheckpointError


def find(
    held: LocalShards,
    state: NamedState,
    model: nn.Module,
    optimizer: Any,
    selection: Selection,
) -> None:
    """Fill `held`: what a rank has of each tensor follows from the tensor itself."""
    inner = innermost(optimizer)
    trained = trained_ids(list(state.parameters.values()), inner)
    for name, parameter in state.parameters.items():
        is_fenced = id(parameter) in trained
        held.sources.append(
            _source("model", name, parameter, state.holders[name], selection.dtype, at_once=not is_fenced)
        )
    add_buffers(held, state, selection)
    if inner is None:
        return
    names = names_by_id(state)
    if not selection.weights_only:
        _refuse_state_in_no_group(inner, names)
    held.members.append((inner.__dict__, "state", inner.state))
    held.sizes.append((inner.state, len(inner.state)))
    held.sizes.append((inner.param_groups, len(inner.param_groups)))
    for index, group in enumerate(inner.param_groups):
        in_group = [name_of(parameter, names, index) for parameter in group["params"]]
        held.groups.append((group, in_group))
        held.sizes.append((group["params"], len(in_group)))
        if selection.weights_only:
            continue
        for parameter, name in zip(group["params"], in_group, strict=True):
            values = inner.state.get(parameter)
            if values is None:
                continue
            held.members.append((inner.state, parameter, values))
            for leaf in state_leaves(held, inner, [name], values, parameter):
                held.sources.append(_state(inner, name, leaf, parameter))


def _refuse_state_in_no_group(inner: Any, names: Mapping[int, str]) -> None:
    """Refuse state of a tensor that the optimizer does not step on: a checkpoint has no place for it.

    Adagrad makes its state when it is constructed. FSDP2 then puts DTensors in place of the parameters, and that state
    stays behind under the tensors of before, where no step reads it.
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


def find_stepped(optimizer: Any, names: dict[int, str]) -> list[OptimizedTensor]:
    """The parameters in the optimizer's groups, frozen ones too: they may be trained again later."""
    inner = innermost(optimizer)
    return [
        OptimizedTensor(group, parameter, [name_of(parameter, names, index)])
        for index, group in enumerate(inner.param_groups)
        for parameter in group["params"]
    ]


def _state(optimizer: Any, name: str, leaf: Leaf, parameter: Tensor) -> TensorShard:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        return source_of(number_spec("optimizer", full_name, value), place, whole_number(), at_once=True)
    if value.ndim and isinstance(parameter, DTensor) and not isinstance(value, DTensor) and _is_sharded(parameter):
        raise refuse_state(optimizer, leaf.name, name, "a plain tensor, though the parameter is sharded")
    return _source("optimizer", full_name, value, place, None, at_once=leaf.is_made)


def _is_sharded(parameter: DTensor) -> bool:
    return any(not placement.is_replicate() for placement in parameter.placements)


def add_buffers(held: LocalShards, state: NamedState, selection: Selection) -> None:
    """Buffers are rank zero's, which is what DDP and our evaluation take them for; all ranks get them back."""
    is_writer = selection.is_main_process or selection.restoring
    for name, buffer in state.buffers.items():
        source = _source("model", name, buffer, state.holders[name], selection.dtype, at_once=True)
        if not is_writer and not isinstance(buffer, DTensor):
            source = replace(source, runs=())
        held.sources.append(source)


def _source(
    section: Section, name: str, value: Tensor, place: tuple[Any, Any], dtype: torch.dtype | None, *, at_once: bool
) -> TensorShard:
    spec = spec_of(section, name, value, tuple(value.shape), dtype)
    runs = runs_of(name, value) if isinstance(value, DTensor) else whole(value)
    return source_of(spec, place, runs, at_once=at_once)
