"""Everything that a rank holds of one training state, whatever the strategy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.index import split_name
from harness.checkpoint.format.json_values import Put, UnsavableTensor, encode
from harness.checkpoint.format.names import NamedState, is_fsdp1, modules_of, named_state, some
from harness.checkpoint.format.tensor_shard import TensorShard
from harness.checkpoint.sharding.state_form import Form, Leaf, form_of, is_leaf, is_object, leaves_of, needed_form
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

_REQUIRES_GRAD = operator.attrgetter("requires_grad")
# What a parameter group may have that does not change.
_CONSTANTS = (Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, DeviceMesh, dist.ProcessGroup)


class Selection(NamedTuple):
    """Which part of a state is looked for; see `find_held`."""

    weights_only: bool
    dtype: torch.dtype | None
    is_main_process: bool
    restoring: bool


@dataclass
class LocalShards:
    """What there is to save, as this rank holds it.

    Args:
        sources: every logical tensor, in the same order on every rank, also those of which this rank
            holds nothing.
        aliases: tied name -> the name under which the tensor is stored.
        groups: the optimizer's parameter groups: the live dictionary, and the names of its parameters.
        sharded_modules: FSDP2's modules, or FSDP1's units, which may hold unsharded parameters for a while.
        sizes: containers whose length must stay for all this to hold.
        members: (dictionary, key, value): what must stay where it is; None: there is nothing.
        trees: (state, kind, the parameter, form): optimizer state that is neither a tensor nor a number, and
            must keep its form.
        forms: parameter -> form of its optimizer state, where that does not follow from the names in the file.
        complete: collective; adds the sources that a rank cannot find by itself, once all ranks have found theirs.
        refresh: collective; what follows from the tensors, once a checkpoint has been read into them.
    """

    sources: list[TensorShard] = field(default_factory=list)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: list[tuple[Mapping[str, Any], list[str]]] = field(default_factory=list)
    sharded_modules: tuple[Any, ...] = ()
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    members: list[tuple[Any, Any, Any]] = field(default_factory=list)
    trees: list[tuple[Mapping[Any, Any], Any, Tensor, Form]] = field(default_factory=list)
    forms: dict[str, Form] = field(default_factory=dict)
    complete: Callable[[Collectives], None] = lambda _: None
    refresh: Callable[[], None] = lambda: None

    @property
    def is_current(self) -> bool:
        """Whether the model and the optimizer still have the structure that was found."""
        (containers, sizes), (mappings, keys, values) = self._columns
        found = map(dict.get, mappings, keys)
        is_same = list(map(len, containers)) == sizes and all(map(operator.is_, found, values))
        return is_same and all(_has_form(*tree) for tree in self.trees)

    @cached_property
    def _columns(self) -> tuple[tuple[list[Any], list[int]], tuple[list[Any], list[Any], list[Any]]]:
        """Sizes and members by columns, so that the loops are in C: asked at each save, once all is found."""
        return (
            ([container for container, _ in self.sizes], [size for _, size in self.sizes]),
            (
                [mapping for mapping, _, _ in self.members],
                [key for _, key, _ in self.members],
                [value for _, _, value in self.members],
            ),
        )

    def reshard(self) -> None:
        """Make FSDP hold its sharded parameters.

        After a forward without a backward (an evaluation) FSDP2's root keeps the unsharded ones, which are
        other tensors than those that the optimizer updates; FSDP1 where it does not reshard after forward.
        """
        for module in self.sharded_modules:
            module.reshard()

    def hyperparameters(self, put: Put) -> list[dict[str, Any]]:
        """Of each parameter group, as they are now, as JSON values; `put` keeps what is a larger tensor.

        Raises:
            CheckpointError: if one can neither be saved nor be left to the code that makes the optimizer.
        """
        return [_hyperparameters(number, group, put, self._is_own) for number, (group, _) in enumerate(self.groups)]

    def _is_own(self, parameter: Tensor) -> bool:
        """Whether a parameter is of the model or of a group. Slow; for the rare group that refers to one."""
        groups = (group["params"] for group, _ in self.groups)
        models = (source.holder[source.key] for source in self.sources if source.spec.section == "model")
        return any(parameter is each for each in chain(chain.from_iterable(groups), models))

    def frozen_names(self) -> list[str]:
        """Names of parameters in the groups that get no gradient; flattened ones (FSDP1, ZeRO) have none."""
        pairs = [
            (names, list(map(_REQUIRES_GRAD, group["params"])))
            for group, names in self.groups
            if len(names) == len(group["params"])
        ]
        return [
            name
            for names, flags in pairs
            if not all(flags)
            for name, flag in zip(names, flags, strict=True)
            if not flag
        ]

    def group_names(self) -> list[list[str]]:
        """Names of the parameters in each group; they stay for as long as all this holds."""
        return [names for _, names in self.groups]


def find_held(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    weights_only: bool,
    dtype: torch.dtype | None,
    restoring: bool = False,
) -> LocalShards:
    """Find what this rank holds of weights, buffers and optimizer state.

    Effects: not collective; main thread, between steps; reads metadata only.

    Args:
        accelerator: which ranks and which strategy.
        model: the prepared model.
        optimizer: the prepared optimizer, or None.
        weights_only: leave the optimizer's state out.
        dtype: floating-point weights are written as this type; None: as they are.
        restoring: find all that is to be filled, rather than all that is to be written: buffers on every
            rank, and the masters of weights that are fp32 themselves.

    Raises:
        CheckpointError: if something is not understood; nothing is guessed.
    """
    selection = Selection(weights_only, dtype, accelerator.is_main_process, restoring)
    return find_named(model, optimizer, selection, name_tensors(model))


class NamedTensor(NamedTuple):
    """The tensors of one model by name, with its modules that are sharded: `units` are FSDP1's."""

    state: NamedState
    units: Sequence[Any]
    sharded: tuple[Any, ...]


def name_tensors(model: nn.Module, prefix: str = "", named_before: dict[int, str] | None = None) -> NamedTensor:
    """Name what a prepared model holds, sharded as it is between steps; see `named_state` for the arguments."""
    from harness.checkpoint.sharding import fsdp1

    _refuse_extra_state(model)
    units = fsdp1.units_of(model)
    sharded = _resharded(model, units)
    return NamedTensor(named_state(model, fsdp1.stands_of(units), prefix, named_before), units, sharded)


def find_named(model: nn.Module, optimizer: Any, selection: Selection, named: NamedTensor) -> LocalShards:
    """Find what this rank holds of a model whose tensors are named, and of its optimizer; see `find_held`."""
    from harness.checkpoint.sharding import fsdp1, plain, zero

    state, units, sharded = named
    held = LocalShards(
        aliases=state.aliases, sharded_modules=sharded, sizes=list(state.sizes), members=list(state.members)
    )
    if units:
        fsdp1.find(held, state, units, optimizer, selection)
    elif is_engine(model):
        zero.find(held, state, model, optimizer, selection)
    elif any(hasattr(parameter, "ds_id") for parameter in state.parameters.values()):
        raise CheckpointError(
            "the model's parameters are partitioned by DeepSpeed, and it is not an engine; pass what "
            "accelerator.prepare returned to watch()"
        )
    else:
        plain.find(held, state, model, optimizer, selection)
    if held.trees:
        _refuse_ambiguous(held, innermost(optimizer), state.others.values())
    return held


class OptimizedTensor(NamedTuple):
    """One tensor that the innermost optimizer steps on: a parameter, or a flat partition of many.

    Args:
        group: the live parameter group.
        tensor: as the optimizer has it in its state.
        names: of the parameters that are in it.
    """

    group: dict[str, Any]
    tensor: Tensor
    names: list[str]


def find_stepped(model: nn.Module, optimizer: Any, named: NamedTensor) -> list[OptimizedTensor]:
    """What the innermost optimizer steps on, in the same order on every rank.

    Effects: not collective; main thread, between steps; reads metadata only.

    Raises:
        CheckpointError: as `find_held`.
    """
    from harness.checkpoint.sharding import fsdp1, plain, zero

    state, units, _ = named
    if units:
        return fsdp1.find_stepped(optimizer, state, units)
    names = names_by_id(state)
    if is_engine(model):
        return zero.find_stepped(model, names)
    return plain.find_stepped(optimizer, names)


def is_engine(model: nn.Module) -> bool:
    """Whether a model is DeepSpeed's engine, compiled or not, whoever has made it: accelerate, or Lightning."""
    return any(base.__name__ == "DeepSpeedEngine" for base in type(getattr(model, "_orig_mod", model)).__mro__)


def _resharded(model: nn.Module, units: Sequence[Any]) -> tuple[Any, ...]:
    """FSDP2's modules and FSDP1's units, which hold their sharded parameters now."""
    sharded = (*(module for module in model.modules() if isinstance(module, FSDPModule)), *units)
    for each in sharded:
        each.reshard()
    return sharded


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
            continue  # to gather what FSDP1 has sharded below it is collective
        if more := _more_than_tensors(prefix, module):
            name, kind = prefix.rstrip(".") or "the model", type(module).__name__
            raise CheckpointError(
                f"{name}: the state_dict() of {kind} has {some(more)}, neither parameters nor buffers, which a "
                "checkpoint of the model would not have; make them buffers, keep them out of state_dict() (of a "
                "torchmetrics object: persistent(False)), or move the module out of the model"
            )


def _has_own_state_dict(module: nn.Module) -> bool:
    """Whether a class, an instance attribute or a hook decides what is in a module's `state_dict`."""
    is_overridden = type(module).state_dict is not nn.Module.state_dict or "state_dict" in vars(module)
    return is_overridden or bool(module._state_dict_hooks)


def _more_than_tensors(prefix: str, module: nn.Module) -> list[str]:
    """Names in a module's own `state_dict` that are neither parameters nor buffers in it, whatever they are called."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    names, places = {name for name, _ in tensors}, {_place(tensor) for _, tensor in tensors}
    try:
        state = module.state_dict()
    except Exception as error:
        raise CheckpointError(
            f"{prefix.rstrip('.') or 'the model'}: the state_dict() of {type(module).__name__} fails, so what it has "
            f"beside parameters and buffers is not known: {error}; mend it, or move the module out of the model"
        ) from error
    return [
        f"{prefix}{key}"
        for key, value in state.items()
        if key not in names and not (isinstance(value, Tensor) and _place(value) in places)
    ]


def _place(tensor: Tensor) -> Any:
    """Where a tensor lies; its identity, where it has no memory."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.data_ptr() or id(tensor)


def name_of(parameter: Tensor, names: Mapping[int, str], group_index: int) -> str:
    """The name of an optimizer's parameter.

    Raises:
        CheckpointError: if it belongs to no watched model.
    """
    name = names.get(id(parameter))
    if name is None:
        raise CheckpointError(
            f"optimizer: a parameter of group {group_index} with shape {tuple(parameter.shape)} is not the model's; "
            "pass the optimizer with the model that it trains to watch()"
        )
    return name


def names_by_id(state: NamedState) -> dict[int, str]:
    """Identity of a parameter -> its name; those of other models of the checkpoint come last."""
    own = {id(parameter): name for name, parameter in state.parameters.items()}
    return {**own, **state.others}


def state_leaves(
    held: LocalShards, optimizer: Any, names: Sequence[str], values: Mapping[Any, Any], tensor: Tensor
) -> list[Leaf]:
    """The leaves of what an optimizer keeps for one tensor; `held` notes its structure and its form.

    Effects: not collective; main thread, between steps; reads metadata only.

    Args:
        held: is filled.
        optimizer: for messages.
        names: of the parameters that are in the tensor.
        values: the state.
        tensor: that the optimizer steps on.

    Raises:
        CheckpointError: if something in it is not understood.
    """
    held.sizes.append((values, len(values)))
    for kind, value in values.items():
        if value is None:
            held.members.append((values, kind, None))
        elif not is_leaf(value):
            try:
                held.trees.append((values, kind, tensor, form_of(value, tensor)))
            except TypeError as error:
                raise refuse_state(optimizer, str(kind), names[0] if names else "a parameter", str(error)) from error
    try:
        form = needed_form(values, tensor)
    except TypeError as error:
        kinds = ", ".join(map(str, values))
        raise refuse_state(optimizer, kinds, names[0] if names else "a parameter", str(error)) from error
    if form is not None:
        held.forms.update(dict.fromkeys(names, form))
    return list(leaves_of(values))


def _has_form(values: Mapping[Any, Any], kind: Any, tensor: Tensor, form: Form) -> bool:
    try:
        return bool(form_of(values.get(kind), tensor) == form)
    except TypeError:
        return False  # which is refused, with its name, when it is planned for


def _refuse_ambiguous(held: LocalShards, optimizer: Any, others: Iterable[str]) -> None:
    """Refuse names by which a reader would not find the parameter that a part of a state belongs to.

    Raises:
        CheckpointError: with the first of them.
    """
    names = {source.spec.name for source in held.sources if source.spec.section == "model"}.union(others)
    seen: set[str] = set()
    for source in held.sources:
        name = source.spec.name
        if source.spec.section != "optimizer":
            continue
        if name in seen or (
            isinstance(source.key, tuple) and split_name(name, names)[0] != ".".join(map(str, source.key))
        ):
            raise CheckpointError(
                f"{type(optimizer).__name__}: cannot save its state {name!r}: another tensor would have this name; "
                "rename a parameter, or use checkpoint.save_weights_only"
            )
        seen.add(name)


def refuse_state(optimizer: Any, kind: str, name: str, what: str) -> CheckpointError:
    """The error for optimizer state that is not understood."""
    return CheckpointError(
        f"{type(optimizer).__name__}: cannot save its state {kind!r} of {name}: {what}; "
        "use checkpoint.save_weights_only, or another optimizer"
    )


def _hyperparameters(
    number: int, group: Mapping[str, Any], put: Put, is_own: Callable[[Tensor], bool]
) -> dict[str, Any]:
    """The values of a parameter group: learning rate, betas, ...

    Values that cannot be saved are left out if the code makes them again; see `_is_made_by_code`.
    """
    values = {}
    for key, value in group.items():
        if key == "params":
            continue
        try:
            values[key] = encode(value, put)
        except UnsavableTensor as error:
            raise CheckpointError(
                f"optimizer: {key!r} of parameter group {number} cannot be saved: it has {error}; use "
                "checkpoint.save_weights_only, or another optimizer"
            ) from error
        except TypeError as error:
            if not _is_made_by_code(value, is_own):
                raise CheckpointError(
                    f"optimizer: {key!r} of parameter group {number} cannot be saved: {error}; make it a number, a "
                    "tensor or a container of these, or use checkpoint.save_weights_only"
                ) from error
    return values


def _is_made_by_code(value: Any, is_own: Callable[[Tensor], bool]) -> bool:
    """Whether a value has no state of its own: the code that makes the optimizer gives the same one again.

    Functions, classes, constants, handles of the hardware, the model's own parameters, and containers of these.
    """
    if value is None or isinstance(value, (str, bool)):
        return True
    if isinstance(value, nn.Parameter):
        return is_own(value)
    if isinstance(value, Mapping):
        return all(_is_made_by_code(item, is_own) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_made_by_code(item, is_own) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return bool(getattr(type(value), "__dataclass_params__").frozen)  # noqa: B009
    return isinstance(value, _CONSTANTS) or (callable(value) and not is_object(value))


def innermost(optimizer: Any) -> Any:
    """The user's own optimizer, inside accelerate's and DeepSpeed's wrappers.

    An optimizer of the user's may hold another one as ``optimizer``, as Lookahead does: it stays the user's own.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None and not _is_users_own(optimizer):
        optimizer = inner
    return optimizer


def _is_users_own(optimizer: Any) -> bool:
    is_accelerates = any(base.__name__ == "AcceleratedOptimizer" for base in type(optimizer).__mro__)
    return isinstance(optimizer, torch.optim.Optimizer) and not is_accelerates


def trained_ids(parameters: Sequence[Tensor], optimizer: Any) -> set[int]:
    """Which parameters change in an optimizer's step and nowhere else."""
    if optimizer is None:
        return {id(parameter) for parameter in parameters if parameter.requires_grad}
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
