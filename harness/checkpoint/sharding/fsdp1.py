"""FSDP1: each rank's slice of flat parameters as runs of the parameters that were flattened.

With ``use_orig_params`` the optimizer steps on views of that slice, one for each parameter; without, on the slice.
Torch says where in it each parameter lies, so padding and what is left free for alignment are never looked at.
What is read are fields of torch's handles (read with torch 2.13); nothing but `_complete` is collective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.names import NamedState, Stand, is_fsdp1
from harness.checkpoint.format.tensor_shard import (
    ElementRange,
    TensorShard,
    number_spec,
    source_of,
    spec_of,
    whole,
    whole_number,
)
from harness.checkpoint.sharding.local_shards import (
    LocalShards,
    OptimizedTensor,
    Selection,
    innermost,
    name_of,
    refuse_state,
    state_leaves,
    trained_ids,
)
from harness.checkpoint.sharding.plain import add_buffers
from harness.checkpoint.sharding.state_form import Leaf
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError


class Part(NamedTuple):
    """One parameter as a rank has it.

    Args:
        parameter: by which it is named: itself, or what stands for it where only the flat one is there.
        shape: of all of it.
        tensor: that the optimizer steps on, and that holds the values.
        place: where that is looked up; None: where the module has the parameter.
        runs: what of the parameter is in that tensor.
        is_absent: nothing of it is here, and so torch gives it no gradient here: what state it may have is of no step.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]
    tensor: Tensor
    place: tuple[Any, Any] | None
    runs: tuple[ElementRange, ...]
    is_absent: bool = False


class Unit:
    """One flat parameter: of what is in a wrapped module, and in no wrapped module within that.

    Raises:
        CheckpointError: if something in it is not understood.
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
                    f"{name}: does not lie in C order (channels_last, say), and FSDP1 has flattened it so; make it "
                    "contiguous before it is wrapped"
                )
        self.parts = [self._part(index) for index in range(len(flat._param_infos))]

    def _part(self, index: int) -> Part:
        flat = self._flat
        info, shape = flat._shard_param_infos[index], tuple(flat._shapes[index])
        runs: tuple[ElementRange, ...] = ()
        if info.in_shard and info.numel_in_shard:
            local = 0 if self.has_views else info.offset_in_shard
            runs = (ElementRange(info.intra_param_start_idx, local, info.numel_in_shard),)
        if self.has_views:
            return Part(flat._params[index], shape, flat._params[index], None, runs, is_absent=not runs)
        stands = nn.Parameter(torch.empty(shape, dtype=flat.dtype, device="meta"), requires_grad=flat.requires_grad)
        return Part(stands, shape, flat, (self._handle.__dict__, "flat_param"), runs)

    def stands(self) -> Iterator[Stand]:
        """What stands for parameters that their modules no longer have, tied ones too."""
        if self.has_views:
            return
        places = {}
        for info, part in zip(self._flat._param_infos, self.parts, strict=True):
            places[id(info.module), info.param_name] = part.parameter
            yield info.module, info.param_name, part.parameter
        for tied in self._flat._shared_param_infos:
            yield tied.module, tied.param_name, places[id(tied.prim_module), tied.prim_param_name]

    def reshard(self) -> None:
        """Have the modules hold their slices: after a forward without a backward they may hold all of it.

        What was gathered is kept, as torch does: the next forward gathers on all ranks, or on none.
        """
        handle, flat = self._handle, self._flat
        if self._has_begun:
            if handle._skipped_use_sharded_views or flat.data_ptr() != flat._local_shard.data_ptr():
                handle.reshard(False)
                handle.post_reshard()
        elif self.has_views and any(part.parameter.dtype != flat.dtype for part in self.parts):
            # accelerate has made 32 bits of 16 in the flat parameter, which its views follow in the first forward.
            handle._use_sharded_views()

    def forget_gathered(self) -> None:
        """Free what was gathered of values that are going to be replaced. On all ranks: the next forward gathers."""
        if self._has_begun and self._handle.uses_sharded_strategy:
            self._handle.reshard(True)
            self._handle.post_reshard()

    @property
    def _has_begun(self) -> bool:
        """Whether there was a forward: only then is there anything beside the slice."""
        return hasattr(self._flat, "_local_shard")


def _is_in_order(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements lie in C order; unlike torch's own flag, with any stride for a dimension of length 1."""
    if 0 in shape:
        return True
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def units_of(model: nn.Module) -> list[Unit]:
    """The flat parameters of a model; none where it is not FSDP1's.

    Raises:
        CheckpointError: if something is not understood.
    """
    wrappers: list[Any] = [module for module in model.modules() if is_fsdp1(module)]
    try:
        return [Unit(wrapper._handle) for wrapper in wrappers if wrapper._handle is not None]
    except AttributeError as error:
        raise CheckpointError(f"FSDP1 of torch {torch.__version__} is not understood: {error}") from error


def stands_of(units: Sequence[Unit]) -> list[Stand]:
    """What stands for the parameters of all units that their modules no longer have."""
    return [stand for unit in units for stand in unit.stands()]


def find(held: LocalShards, state: NamedState, units: Sequence[Unit], optimizer: Any, selection: Selection) -> None:
    """Fill `held` with this rank's slices, and with what FSDP1 was told to leave alone."""
    if selection.restoring:
        for unit in units:
            unit.forget_gathered()
    inner = innermost(optimizer)
    parts = _parts(state, units)
    trained = trained_ids([part.tensor for part in parts.values()], inner)
    for name, part in parts.items():
        spec = spec_of("model", name, part.parameter, part.shape, selection.dtype)
        place = part.place or state.holders[name]
        held.sources.append(source_of(spec, place, part.runs, at_once=id(part.tensor) not in trained))
    add_buffers(held, state, selection)
    if inner is None:
        return
    held.members.append((inner.__dict__, "state", inner.state))
    held.sizes.append((inner.state, len(inner.state)))
    held.sizes.append((inner.param_groups, len(inner.param_groups)))
    # Of each parameter the rank that has its first element tells those that have nothing of it.
    told: dict[str, list[TensorSpec]] = {}
    for stepped in _stepped(inner, parts, units):
        if not held.groups or held.groups[-1][0] is not stepped.group:
            held.groups.append((stepped.group, []))
            held.sizes.append((stepped.group["params"], len(stepped.group["params"])))
        held.groups[-1][1].extend(stepped.names)
        values = inner.state.get(stepped.tensor)
        is_absent = parts[stepped.names[0]].is_absent
        if values is None or selection.weights_only or (is_absent and not selection.restoring):
            continue
        held.members.append((inner.state, stepped.tensor, values))
        for leaf in state_leaves(held, inner, stepped.names, values, stepped.tensor):
            for name in stepped.names:
                source = _state(inner, name, leaf, parts[name])
                held.sources.append(source)
                if parts[name].runs and parts[name].runs[0].logical == 0:
                    told.setdefault(name, []).append(source.spec)
    if not selection.weights_only:
        held.complete = partial(_complete, held, parts, told)
        held.refresh = partial(_forget, inner, parts)


def find_stepped(optimizer: Any, state: NamedState, units: Sequence[Unit]) -> list[OptimizedTensor]:
    """The views, or the flat parameters, in the optimizer's groups."""
    return list(_stepped(innermost(optimizer), _parts(state, units), units))


def _parts(state: NamedState, units: Sequence[Unit]) -> dict[str, Part]:
    """All of the model's parameters, by name."""
    flattened = {id(part.parameter): part for unit in units for part in unit.parts}
    parts: dict[str, Part] = {}
    for name, parameter in state.parameters.items():
        if isinstance(parameter, DTensor):
            raise CheckpointError(f"{name}: is a DTensor in a model of FSDP1's, which is not understood; use FSDP2")
        alone = Part(parameter, tuple(parameter.shape), parameter, None, whole(parameter))
        parts[name] = flattened.get(id(parameter), alone)
    return parts


def _stepped(inner: Any, parts: Mapping[str, Part], units: Sequence[Unit]) -> Iterator[OptimizedTensor]:
    names: dict[int, list[str]] = {}
    for name, part in parts.items():
        names.setdefault(id(part.tensor), []).append(name)
    for index, group in enumerate(inner.param_groups):
        for tensor in group["params"]:
            if id(tensor) not in names and not all(unit.has_views for unit in units):
                raise CheckpointError(
                    f"optimizer: a parameter of group {index} with shape {tuple(tensor.shape)} is none that FSDP1 "
                    "trains; make the optimizer of the parameters of the prepared model, or put "
                    "`fsdp_use_orig_params: true` into the accelerate configuration"
                )
            yield OptimizedTensor(group, tensor, names.get(id(tensor)) or [name_of(tensor, {}, index)])


def _state(optimizer: Any, name: str, leaf: Leaf, part: Part) -> TensorShard:
    full_name, value, place = f"{leaf.name}.{name}", leaf.value, (leaf.holder, leaf.key)
    if not isinstance(value, Tensor):
        runs = () if part.is_absent else whole_number()
        return source_of(number_spec("optimizer", full_name, value), place, runs, at_once=True)
    if value.shape == part.tensor.shape:
        return source_of(
            spec_of("optimizer", full_name, value, part.shape, None), place, part.runs, at_once=leaf.is_made
        )
    if value.numel() == 1:
        spec = spec_of("optimizer", full_name, value, tuple(value.shape), None)
        return source_of(spec, place, () if part.is_absent else whole(value), at_once=leaf.is_made)
    what = f"of shape {tuple(value.shape)}, for a slice of shape {tuple(part.tensor.shape)}"
    raise refuse_state(optimizer, leaf.name, name, what)


def _complete(
    held: LocalShards, parts: Mapping[str, Part], told: Mapping[str, list[TensorSpec]], collectives: Collectives
) -> None:
    """Learn what state there is of parameters of which this rank has nothing. Collective."""
    known: dict[str, list[TensorSpec]] = {}
    for specs_of, forms in collectives.all_gather("what state there is", (told, held.forms)):
        known |= specs_of
        held.forms |= forms
    for name, part in parts.items():
        if part.is_absent:
            held.sources += [TensorShard(spec, {}, None, ()) for spec in known.get(name, ())]
    # In the same order on every rank.
    held.sources.sort(key=lambda source: source.spec.name if source.spec.section == "optimizer" else "")


def _forget(optimizer: Any, parts: Mapping[str, Part]) -> None:
    """Take away the state that was made, for a checkpoint to be read, of what this rank has nothing of."""
    for part in parts.values():
        if part.is_absent:
            optimizer.state.pop(part.tensor, None)
