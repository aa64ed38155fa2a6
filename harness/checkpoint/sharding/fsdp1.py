"""Convert each rank's slice of FSDP1's flat parameters to ranges of the original parameters.

With ``use_orig_params`` the optimizer steps on views of the slice, one for each parameter; without it, on the slice.
Torch records the position of each parameter in the slice, so padding and alignment gaps are never read. This module
reads private fields of torch's handles (written for torch 2.13). Only `Fsdp1Shards.complete` is collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.names import NamedState, Placeholder, is_fsdp1
from harness.checkpoint.format.tensor_shard import (
    ElementRange,
    TensorShard,
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
    innermost,
    name_of,
    state_error,
    trained_ids,
)
from harness.checkpoint.sharding.plain import add_buffers
from harness.checkpoint.sharding.state_form import Leaf
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


class Part(NamedTuple):
    """Describe one parameter on this rank.

    Args:
        parameter: the named parameter, or its placeholder if the module has only the flat parameter.
        shape: shape of the whole parameter.
        tensor: tensor that holds the values and that the optimizer steps on.
        place: (holder, key) of `tensor`; None if it is where the module keeps the parameter.
        ranges: ranges of the parameter in `tensor`.
        is_absent: this rank holds no element of it. It gets no gradient here, so no step creates its state.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    tensor: Tensor
    place: tuple[Any, Any] | None
    ranges: tuple[ElementRange, ...]
    is_absent: bool = False


class Unit:
    """Describe one flat parameter: that of a wrapped module, without the wrapped modules inside.

    Raises:
        CheckpointError: with tensor parallelism, or if a parameter was not in C order when it was flattened.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._flat = flat = handle.flat_param
        self.has_views: bool = handle._use_orig_params
        if any(each is not None for each in flat._param_extensions):
            raise CheckpointError(
                "FSDP1 with tensor parallelism cannot be saved; use FSDP2 (see configs/accelerate/fsdp2.yaml)"
            )
        for name, shape, strides in zip(flat._fqns, flat._shapes, flat._strides, strict=True):
            if not _is_in_order(shape, strides):
                raise CheckpointError(
                    f"{name}: does not lie in C order (for example channels_last), and FSDP1 has flattened it so; make "
                    "it contiguous before it is wrapped"
                )
        self.parts = [self._part(index) for index in range(len(flat._param_infos))]

    def _part(self, index: int) -> Part:
        flat = self._flat
        info, shape = flat._shard_param_infos[index], tuple(flat._shapes[index])
        ranges: tuple[ElementRange, ...] = ()
        if info.in_shard and info.numel_in_shard:
            local = 0 if self.has_views else info.offset_in_shard
            ranges = (ElementRange(info.intra_param_start_idx, local, info.numel_in_shard),)
        if self.has_views:
            return Part(flat._params[index], shape, flat._params[index], None, ranges, is_absent=not ranges)
        meta = nn.Parameter(torch.empty(shape, dtype=flat.dtype, device="meta"), requires_grad=flat.requires_grad)
        return Part(meta, shape, flat, (self._handle.__dict__, "flat_param"), ranges)

    def placeholders(self) -> Iterator[Placeholder]:
        """Yield placeholders of the parameters that FSDP1 has removed from their modules, including tied ones."""
        if self.has_views:
            return
        parameters = {}
        for info, part in zip(self._flat._param_infos, self.parts, strict=True):
            parameters[id(info.module), info.param_name] = part.parameter
            yield info.module, info.param_name, part.parameter
        for tied in self._flat._shared_param_infos:
            yield tied.module, tied.param_name, parameters[id(tied.prim_module), tied.prim_param_name]

    def reshard(self) -> None:
        """Make the modules hold their slices: after a forward without a backward they may hold whole parameters.

        The gathered parameters are not freed, because the next forward must gather on all ranks or on none.
        """
        handle, flat = self._handle, self._flat
        if self._has_run_forward:
            if handle._skipped_use_sharded_views or flat.data_ptr() != flat._local_shard.data_ptr():
                handle.reshard(False)
                handle.post_reshard()
        elif self.has_views and any(part.parameter.dtype != flat.dtype for part in self.parts):
            # accelerate has upcast the flat parameter to fp32; torch updates its views only in the first forward.
            handle._use_sharded_views()

    def forget_gathered(self) -> None:
        """Free gathered parameters, which a restore makes stale. Call this on all ranks: the next forward gathers."""
        if self._has_run_forward and self._handle.uses_sharded_strategy:
            self._handle.reshard(True)
            self._handle.post_reshard()

    @property
    def _has_run_forward(self) -> bool:
        """Return whether a forward has run; before it, only the slice exists."""
        return hasattr(self._flat, "_local_shard")


def _is_in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Return whether elements are in C order. As opposed to torch, a dimension of length 1 may have any stride."""
    if 0 in shape:
        return True
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def units_of(model: nn.Module) -> list[Unit]:
    """List the flat parameters of a model; empty without FSDP1.

    Raises:
        CheckpointError: as `Unit`, or if torch's handles have an unknown structure.
    """
    wrappers: list[Any] = [module for module in model.modules() if is_fsdp1(module)]
    try:
        return [Unit(wrapper._handle) for wrapper in wrappers if wrapper._handle is not None]
    except AttributeError as error:
        raise CheckpointError(f"FSDP1 of torch {torch.__version__} has an unknown structure: {error}") from error


@dataclass
class Fsdp1Shards(LocalShards):
    """Hold shards of FSDP1. A rank that holds no element of a parameter receives the names of its state from others.

    Args:
        has_state: whether the optimizer's state is saved or restored.
        parts: the model's parameters by name.
        specs: parameter -> specifications of its state, if this rank holds the parameter's first element.
        optimizer: the innermost optimizer.
    """

    has_state: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)
    specs: dict[str, list[TensorSpec]] = field(default_factory=dict)
    optimizer: Any = None

    def complete(self, collectives: Collectives) -> None:
        """Implement `LocalShards.complete`. Collective."""
        if not self.has_state:
            return
        specs_by_name: dict[str, list[TensorSpec]] = {}
        for specs, forms in collectives.all_gather("the names of the optimizer's state", (self.specs, self.forms)):
            specs_by_name |= specs
            self.forms |= forms
        for name, part in self.parts.items():
            if part.is_absent:
                self.tensors += [TensorShard(spec, {}, None, ()) for spec in specs_by_name.get(name, ())]
        # Tensors must be in the same order on every rank.
        self.tensors.sort(key=lambda shard: shard.spec.name if shard.spec.section == "optimizer" else "")

    def refresh(self) -> None:
        """Remove the state that a restore has built for parameters of which this rank holds no element."""
        if self.has_state:
            for part in self.parts.values():
                if part.is_absent:
                    self.optimizer.state.pop(part.tensor, None)


def find(
    state: NamedState, units: Sequence[Unit], optimizer: Any, selection: Selection, sharded_modules: tuple[Any, ...]
) -> LocalShards:
    """Find this rank's slices of flat parameters, and the parameters that FSDP1 ignores."""
    if selection.restoring:
        for unit in units:
            unit.forget_gathered()
    inner = innermost(optimizer)
    parts = _parts(state, units)
    has_state = inner is not None and not selection.weights_only
    shards = Fsdp1Shards.of_model(state, sharded_modules, has_state=has_state, parts=parts, optimizer=inner)
    trained = trained_ids([part.tensor for part in parts.values()], inner)
    for name, part in parts.items():
        spec = spec_of("model", name, part.parameter, part.shape, selection.dtype)
        place = part.place or state.holders[name]
        shards.tensors.append(shard_of(spec, place, part.ranges, is_volatile=id(part.tensor) not in trained))
    add_buffers(shards, state, selection)
    if inner is None:
        return shards
    shards.members.append((inner.__dict__, "state", inner.state))
    shards.sizes.append((inner.state, len(inner.state)))
    shards.sizes.append((inner.param_groups, len(inner.param_groups)))
    for stepped in _optimized(inner, parts, units):
        if not shards.groups or shards.groups[-1][0] is not stepped.group:
            shards.groups.append((stepped.group, []))
            shards.sizes.append((stepped.group["params"], len(stepped.group["params"])))
        shards.groups[-1][1].extend(stepped.names)
        values = inner.state.get(stepped.tensor)
        is_absent = parts[stepped.names[0]].is_absent
        if values is None or selection.weights_only or (is_absent and not selection.restoring):
            continue
        shards.members.append((inner.state, stepped.tensor, values))
        for leaf in shards.add_state(inner, stepped.names, values, stepped.tensor):
            for name in stepped.names:
                shard = _state_shard(inner, name, leaf, parts[name])
                shards.tensors.append(shard)
                if parts[name].ranges and parts[name].ranges[0].logical == 0:
                    shards.specs.setdefault(name, []).append(shard.spec)
    return shards


def find_optimized(optimizer: Any, state: NamedState, units: Sequence[Unit]) -> list[OptimizedTensor]:
    """List the views or flat parameters in the optimizer's groups."""
    return list(_optimized(innermost(optimizer), _parts(state, units), units))


def _parts(state: NamedState, units: Sequence[Unit]) -> dict[str, Part]:
    flattened = {id(part.parameter): part for unit in units for part in unit.parts}
    parts: dict[str, Part] = {}
    for name, parameter in state.parameters.items():
        if isinstance(parameter, DTensor):
            raise CheckpointError(f"{name}: is a DTensor in a model wrapped by FSDP1, which cannot be saved; use FSDP2")
        alone = Part(parameter, tuple(parameter.shape), parameter, None, full_range(parameter))
        parts[name] = flattened.get(id(parameter), alone)
    return parts


def _optimized(inner: Any, parts: Mapping[str, Part], units: Sequence[Unit]) -> Iterator[OptimizedTensor]:
    names: dict[int, list[str]] = {}
    for name, part in parts.items():
        names.setdefault(id(part.tensor), []).append(name)
    for index, group in enumerate(inner.param_groups):
        for tensor in group["params"]:
            if id(tensor) not in names and not all(unit.has_views for unit in units):
                raise CheckpointError(
                    f"optimizer: a parameter of group {index} with shape {tuple(tensor.shape)} is not one that FSDP1 "
                    "trains; make the optimizer from the parameters of the prepared model, or set "
                    "`fsdp_use_orig_params: true` in the accelerate configuration"
                )
            yield OptimizedTensor(group, tensor, names.get(id(tensor)) or [name_of(tensor, {}, index)])


def _state_shard(optimizer: Any, name: str, leaf: Leaf, part: Part) -> TensorShard:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        ranges = () if part.is_absent else scalar_range()
        return shard_of(number_spec("optimizer", full_name, value), place, ranges, is_volatile=True)
    if value.shape == part.tensor.shape:
        spec = spec_of("optimizer", full_name, value, part.shape, None)
        return shard_of(spec, place, part.ranges, is_volatile=leaf.is_made)
    if value.numel() == 1:
        spec = spec_of("optimizer", full_name, value, tuple(value.shape), None)
        return shard_of(spec, place, () if part.is_absent else full_range(value), is_volatile=leaf.is_made)
    what = f"of shape {tuple(value.shape)}, for a slice of shape {tuple(part.tensor.shape)}"
    raise state_error(optimizer, leaf.name, name, what)
