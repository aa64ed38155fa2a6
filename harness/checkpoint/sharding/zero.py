"""DeepSpeed ZeRO-1, 2, 3: flat partitions of parameter groups as runs of the logical tensors.

Nothing here is collective, and deepspeed is not imported: what is read are the fields of its engine.
Read with deepspeed 0.19.8; each is checked for what is expected of it, and an error names what is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.checkpoint.format.layout import Section
from harness.checkpoint.format.names import NamedState
from harness.checkpoint.format.tensor_shard import (
    ElementRange,
    number_spec,
    overlap,
    source_of,
    spec_of,
    whole,
    whole_number,
)
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    name_of,
    names_by_id,
    refuse_state,
    state_leaves,
)
from harness.checkpoint.sharding.plain import add_buffers
from harness.checkpoint.sharding.state_form import Leaf
from harness.errors import CheckpointError


def find(
    held: LocalShards,
    state: NamedState,
    model: nn.Module,
    optimizer: Any,
    selection: Selection,
) -> None:
    """Fill `held` from a DeepSpeed engine and its ZeRO optimizer."""
    engine: Any = model
    zero = engine.optimizer
    stage = _stage(zero)
    trained = {id(parameter) for flat in stage.flats for parameter, *_ in flat.members}
    for name, parameter in state.parameters.items():
        shape = stage.shape(parameter)
        holder, key, runs = stage.weight(parameter, state.holders[name])
        spec = spec_of("model", name, parameter, shape, selection.dtype)
        held.sources.append(source_of(spec, (holder, key), runs, at_once=id(parameter) not in trained))
    add_buffers(held, state, selection)
    names = names_by_id(state)
    _add_groups(held, stage, names)
    if selection.restoring:
        held.refresh = stage.refresh
    elif optimizer is None or selection.weights_only:
        return
    inner = zero.optimizer
    held.members.append((inner.__dict__, "state", inner.state))
    for flat in stage.flats:
        values = inner.state.get(flat.tensor, {})
        held.members.append((inner.state, flat.tensor, values if flat.tensor in inner.state else None))
        in_flat = [name_of(parameter, names, flat.group_index) for parameter, _ in flat.members]
        leaves: list[Leaf] = []
        if not selection.weights_only:
            leaves = state_leaves(held, inner, in_flat, values, flat.tensor)
        for (parameter, runs), name in zip(flat.members, in_flat, strict=True):
            shape = stage.shape(parameter)
            if parameter.dtype != torch.float32 or selection.restoring:
                _add(held, "optimizer", f"master.{name}", flat.tensor, shape, flat.place, runs)
            for leaf in leaves:
                _add_state(held, inner, name, leaf, flat.tensor, shape, runs)


def find_stepped(model: nn.Module, names: dict[int, str]) -> list[OptimizedTensor]:
    """This rank's flat partitions."""
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
    raise CheckpointError(
        f"DeepSpeed runs {type(zero).__name__}, of which the shards are not known; use ZeRO stage 1, 2 or 3"
    )


def _add_state(
    held: LocalShards,
    optimizer: Any,
    name: str,
    leaf: Leaf,
    flat: Tensor,
    shape: tuple[int, ...],
    runs: tuple[ElementRange, ...],
) -> None:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        spec = number_spec("optimizer", full_name, value)
        held.sources.append(source_of(spec, place, whole_number(), at_once=True))
    elif value.shape == flat.shape:
        _add(held, "optimizer", full_name, value, shape, place, runs, at_once=leaf.is_made)
    elif value.numel() == 1:
        _add(held, "optimizer", full_name, value, tuple(value.shape), place, whole(value), at_once=leaf.is_made)
    else:
        what = f"of shape {tuple(value.shape)}, for a flat partition of shape {tuple(flat.shape)}"
        raise refuse_state(optimizer, leaf.name, name, what)


def _add(
    held: LocalShards,
    section: Section,
    name: str,
    value: Tensor,
    shape: tuple[int, ...],
    place: tuple[Any, Any],
    runs: tuple[ElementRange, ...],
    *,
    at_once: bool = False,
) -> None:
    held.sources.append(source_of(spec_of(section, name, value, shape, None), place, runs, at_once=at_once))


def _add_groups(held: LocalShards, stage: _Stage12 | _Stage3, names: dict[int, str]) -> None:
    # One entry for each of the user's groups, though stage 3 may cut a group into several flat ones.
    members: dict[int, list[str]] = {}
    for flat in stage.flats:
        members.setdefault(flat.group_index, []).extend(
            name_of(parameter, names, flat.group_index) for parameter, _ in flat.members
        )
    order = {name: position for position, name in enumerate(names.values())}
    for index, in_group in sorted(members.items()):
        held.groups.append((stage.group(index), sorted(in_group, key=order.__getitem__)))


class _Flat(NamedTuple):
    """One flat partition of this rank: the tensor, where it is looked up, and what of whom is in it."""

    group_index: int
    tensor: Tensor
    place: tuple[Any, Any]
    members: list[tuple[nn.Parameter, tuple[ElementRange, ...]]]


class _Stage12:
    """ZeRO-1 and 2: whole weights on each rank; masters and moments are a slice of each flattened group."""

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
                    f"DeepSpeed: a parameter of group {index} with shape {tuple(parameter.shape)} does not lie in its "
                    "group's flat buffer; this version of DeepSpeed is not understood"
                )
            # Where it really lies: groups have padding inside, and may be in another order (round robin).
            offset = parameter.storage_offset() - whole_group.storage_offset()
            first = max(begin, offset)
            count = min(begin + partition_size, offset + parameter.numel()) - first
            runs = (ElementRange(first - offset, first - begin, count),) if count > 0 else ()
            members.append((parameter, runs))
        return _Flat(index, partition, (zero.single_partition_of_fp32_groups, index), members)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(parameter.shape)

    def weight(self, parameter: Tensor, holder: tuple[Any, Any]) -> tuple[Any, Any, tuple[ElementRange, ...]]:
        """Where the weight is looked up, and which part of it this rank holds."""
        return holder[0], holder[1], whole(parameter)

    def group(self, index: int) -> dict[str, Any]:
        """The live parameter group of the user's optimizer."""
        group: dict[str, Any] = self._zero.optimizer.param_groups[index]
        return group

    def refresh(self) -> None:
        """Nothing: the weights, which lie in the groups' flat buffers, are read whole on each rank."""


class _Stage3:
    """ZeRO-3: of each weight, master and moment the same range, cut off where padding begins."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
            raise CheckpointError("DeepSpeed: state that is offloaded to NVMe cannot be saved; offload to cpu instead")
        if getattr(zero, "backup_optimizer", None) is not None:
            raise CheckpointError(
                "DeepSpeed: an optimizer that is offloaded in part cannot be saved; set offload_optimizer's ratio to 1"
            )
        self.flats = [self._flat(index) for index in range(len(zero.fp16_groups))]

    def _flat(self, index: int) -> _Flat:
        zero = self._zero
        members = []
        for parameter in zero.fp16_groups[index]:
            group, offset, count = zero.grad_position[zero.get_param_id(parameter)]
            if group != index or count != parameter.ds_tensor.ds_numel:
                raise CheckpointError("DeepSpeed: grad_position and fp16_groups differ; this version is not understood")
            members.append((parameter, self._runs(parameter, offset)))
        flats = zero.fp32_partitioned_groups_flat
        return _Flat(int(zero.sub_group_to_group_id[index]), flats[index], (flats, index), members)

    def _runs(self, parameter: Any, offset: int) -> tuple[ElementRange, ...]:
        size = parameter.ds_tensor.ds_numel
        begin = dist.get_rank(group=parameter.ds_process_group) * size
        return overlap(begin, offset, size, parameter.ds_numel)

    def shape(self, parameter: Any) -> tuple[int, ...]:
        """Logical shape."""
        return tuple(parameter.ds_shape)

    def weight(self, parameter: Any, holder: tuple[Any, Any]) -> tuple[Any, Any, tuple[ElementRange, ...]]:
        """Where the weight is looked up, and which part of it this rank holds."""
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise CheckpointError("DeepSpeed: hierarchical partitions (zero_hpz_partition_size) cannot be saved yet")
        if parameter.ds_tensor.dtype != parameter.dtype:
            raise CheckpointError("DeepSpeed: quantized weights (zero_quantized_nontrainable_weights) cannot be saved")
        return parameter.__dict__, "ds_tensor", self._runs(parameter, 0)

    def group(self, index: int) -> dict[str, Any]:
        """The live parameter group of the user's optimizer."""
        groups = self._zero.optimizer.param_groups
        group: dict[str, Any] = groups[index] if index < len(groups) else groups[0]
        return group

    def refresh(self) -> None:
        """Gather again what DeepSpeed keeps gathered: small weights, on all ranks. Collective."""
        self._zero.checkpoint_event_prologue()
        self._zero.checkpoint_event_epilogue()
