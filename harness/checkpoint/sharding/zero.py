"""Convert the flat partitions of DeepSpeed ZeRO-1, 2 and 3 to ranges of the logical tensors.

This module reads fields of DeepSpeed's engine (written for deepspeed 0.19.8) without importing deepspeed, and raises an
error if the values are unexpected. Only `ZeroShards.refresh` is collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.checkpoint.format.layout import Section
from harness.checkpoint.format.names import NamedState
from harness.checkpoint.format.tensor_shard import (
    ElementRange,
    clipped_range,
    full_range,
    number_spec,
    scalar_range,
    shard_of,
    spec_of,
)
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    name_of,
    names_by_id,
    state_error,
)
from harness.checkpoint.sharding.plain import add_buffers
from harness.checkpoint.sharding.state_form import Leaf
from harness.errors import CheckpointError


@dataclass
class ZeroShards(LocalShards):
    """Hold shards of ZeRO. `stage` is set only for a restore."""

    stage: _Stage12 | _Stage3 | None = None

    def refresh(self) -> None:
        """Implement `LocalShards.refresh`. Collective in ZeRO-3."""
        if self.stage is not None:
            self.stage.refresh()


def find(
    state: NamedState, model: nn.Module, optimizer: Any, selection: Selection, sharded_modules: tuple[Any, ...]
) -> LocalShards:
    """Find the shards of a DeepSpeed engine and its ZeRO optimizer."""
    engine: Any = model
    zero = engine.optimizer
    stage = _stage(zero)
    shards = ZeroShards.of_model(state, sharded_modules, stage=stage if selection.restoring else None)
    trained = {id(parameter) for flat in stage.flats for parameter, *_ in flat.members}
    for name, parameter in state.parameters.items():
        holder, key, ranges = stage.weight(parameter, state.holders[name])
        spec = spec_of("model", name, parameter, stage.shape(parameter), selection.dtype)
        shards.tensors.append(shard_of(spec, (holder, key), ranges, is_volatile=id(parameter) not in trained))
    add_buffers(shards, state, selection)
    names = names_by_id(state)
    _add_groups(shards, stage, names)
    if not selection.restoring and (optimizer is None or selection.weights_only):
        return shards
    inner = zero.optimizer
    shards.members.append((inner.__dict__, "state", inner.state))
    for flat in stage.flats:
        values = inner.state.get(flat.tensor, {})
        shards.members.append((inner.state, flat.tensor, values if flat.tensor in inner.state else None))
        in_flat = [name_of(parameter, names, flat.group_index) for parameter, _ in flat.members]
        leaves: list[Leaf] = []
        if not selection.weights_only:
            leaves = shards.add_state(inner, in_flat, values, flat.tensor)
        for (parameter, ranges), name in zip(flat.members, in_flat, strict=True):
            shape = stage.shape(parameter)
            if parameter.dtype != torch.float32 or selection.restoring:
                _add(shards, "optimizer", f"master.{name}", flat.tensor, shape, flat.place, ranges)
            for leaf in leaves:
                _add_state(shards, inner, name, leaf, flat.tensor, shape, ranges)
    return shards


def find_optimized(model: nn.Module, names: dict[int, str]) -> list[OptimizedTensor]:
    """List this rank's flat partitions."""
    engine: Any = model
    stage = _stage(engine.optimizer)
    return [
        OptimizedTensor(
            stage.group(flat.group_index),
            flat.tensor,
            [name_of(parameter, names, flat.group_index) for parameter, _ in flat.members],
        )
        for flat in stage.flats
    ]


def _stage(zero: Any) -> _Stage12 | _Stage3:
    if type(zero).__name__ == "DeepSpeedZeroOptimizer":
        return _Stage12(zero)
    if type(zero).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        return _Stage3(zero)
    raise CheckpointError(f"DeepSpeed uses {type(zero).__name__}, whose shards are unknown; use ZeRO stage 1, 2 or 3")


def _add_state(
    shards: LocalShards,
    optimizer: Any,
    name: str,
    leaf: Leaf,
    flat: Tensor,
    shape: tuple[int, ...],
    ranges: tuple[ElementRange, ...],
) -> None:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        spec = number_spec("optimizer", full_name, value)
        shards.tensors.append(shard_of(spec, place, scalar_range(), is_volatile=True))
    elif value.shape == flat.shape:
        _add(shards, "optimizer", full_name, value, shape, place, ranges, is_volatile=leaf.is_made)
    elif value.numel() == 1:
        _add(
            shards,
            "optimizer",
            full_name,
            value,
            tuple(value.shape),
            place,
            full_range(value),
            is_volatile=leaf.is_made,
        )
    else:
        what = f"of shape {tuple(value.shape)}, for a flat partition of shape {tuple(flat.shape)}"
        raise state_error(optimizer, leaf.name, name, what)


def _add(
    shards: LocalShards,
    section: Section,
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    place: tuple[Any, Any],
    ranges: tuple[ElementRange, ...],
    *,
    is_volatile: bool = False,
) -> None:
    shards.tensors.append(shard_of(spec_of(section, name, value, shape, None), place, ranges, is_volatile=is_volatile))


def _add_groups(shards: LocalShards, stage: _Stage12 | _Stage3, names: dict[int, str]) -> None:
    # Add one entry for each of the user's groups; stage 3 may split a group into several flat ones.
    members: dict[int, list[str]] = {}
    for flat in stage.flats:
        members.setdefault(flat.group_index, []).extend(
            name_of(parameter, names, flat.group_index) for parameter, _ in flat.members
        )
    order = {name: position for position, name in enumerate(names.values())}
    for index, in_group in sorted(members.items()):
        shards.groups.append((stage.group(index), sorted(in_group, key=order.__getitem__)))


class _Flat(NamedTuple):
    """Describe one flat partition of this rank: the tensor, its (holder, key), and each parameter's ranges in it."""

    group_index: int
    tensor: Tensor
    place: tuple[Any, Any]
    members: list[tuple[nn.Parameter, tuple[ElementRange, ...]]]


class _Stage12:
    """In ZeRO-1 and 2 each rank holds whole weights, and a slice of the masters and moments of each flat group."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self.flats = [self._flat(index) for index in range(len(zero.bit16_groups))]

    def _flat(self, index: int) -> _Flat:
        zero = self._zero
        partition = zero.single_partition_of_fp32_groups[index]
        partition_size = partition.numel()
        begin = dist.get_rank(group=zero.real_dp_process_group[index]) * partition_size
        whole_group = zero.bit16_groups_flat[index]
        members: list[tuple[nn.Parameter, tuple[ElementRange, ...]]] = []
        for parameter in zero.bit16_groups[index]:
            if parameter.untyped_storage().data_ptr() != whole_group.untyped_storage().data_ptr():
                raise CheckpointError(
                    f"DeepSpeed: a parameter of group {index} with shape {tuple(parameter.shape)} is not in its "
                    "group's flat buffer; this version of DeepSpeed is not supported"
                )
            # Use the real offset: groups contain padding, and may be reordered (round robin).
            offset = parameter.storage_offset() - whole_group.storage_offset()
            first = max(begin, offset)
            count = min(begin + partition_size, offset + parameter.numel()) - first
            ranges = (ElementRange(first - offset, first - begin, count),) if count > 0 else ()
            members.append((parameter, ranges))
        return _Flat(index, partition, (zero.single_partition_of_fp32_groups, index), members)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def weight(self, parameter: Tensor, holder: tuple[Any, Any]) -> tuple[Any, Any, tuple[ElementRange, ...]]:
        """Return holder and key of a weight, and the ranges that this rank holds."""
        return holder[0], holder[1], full_range(parameter)

    def group(self, index: int) -> dict[str, Any]:
        """Return the live parameter group of the user's optimizer."""
        group: dict[str, Any] = self._zero.optimizer.param_groups[index]
        return group

    def refresh(self) -> None:
        """Do nothing: each rank has read whole weights into the groups' flat buffers."""


class _Stage3:
    """In ZeRO-3 each rank holds the same range of a weight, its master and moments; the padding at the end is cut."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
            raise CheckpointError("DeepSpeed: state that is offloaded to NVMe cannot be saved; offload to cpu instead")
        if getattr(zero, "backup_optimizer", None) is not None:
            raise CheckpointError(
                "DeepSpeed: a partly offloaded optimizer cannot be saved; set offload_optimizer's ratio to 1"
            )
        self.flats = [self._flat(index) for index in range(len(zero.fp16_groups))]

    def _flat(self, index: int) -> _Flat:
        zero = self._zero
        members = []
        for parameter in zero.fp16_groups[index]:
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            if group != index or count != parameter.ds_tensor.ds_numel:
                raise CheckpointError("DeepSpeed: grad_position and fp16_groups differ; this version is not supported")
            members.append((parameter, self._ranges(parameter, offset)))
        flats = zero.fp32_partitioned_groups_flat
        return _Flat(int(zero.sub_group_to_group_id[index]), flats[index], (flats, index), members)

    def _ranges(self, parameter: Any, offset: int) -> tuple[ElementRange, ...]:
        size = parameter.ds_tensor.ds_numel
        begin = dist.get_rank(group=parameter.ds_process_group) * size
        return clipped_range(begin, offset, size, parameter.ds_numel)

    def shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def weight(self, parameter: Any, holder: tuple[Any, Any]) -> tuple[Any, Any, tuple[ElementRange, ...]]:
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise CheckpointError("DeepSpeed: hierarchical partitions (zero_hpz_partition_size) cannot be saved yet")
        if parameter.ds_tensor.dtype != parameter.dtype:
            raise CheckpointError("DeepSpeed: quantized weights (zero_quantized_nontrainable_weights) cannot be saved")
        return parameter.__dict__, "ds_tensor", self._ranges(parameter, 0)

    def group(self, index: int) -> dict[str, Any]:
        groups = self._zero.optimizer.param_groups
        group: dict[str, Any] = groups[index] if index < len(groups) else groups[0]
        return group

    def refresh(self) -> None:
        """Regather the small weights that DeepSpeed keeps gathered on all ranks. Collective."""
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()
