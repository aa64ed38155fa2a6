"""Hold the shards of a training state on one rank, for any strategy."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from harness.checkpoint.format.index import split_name
from harness.checkpoint.format.names import NamedState
from harness.checkpoint.format.tensor_shard import TensorShard
from harness.checkpoint.sharding.state_form import Form, Leaf, form_of, is_leaf, leaves_of, needed_form
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

_REQUIRES_GRAD = operator.attrgetter("requires_grad")


class Selection(NamedTuple):
    """Select which part of a state to find.

    Args:
        weights_only: skip the optimizer's state.
        dtype: type in which floating-point weights are written; None keeps theirs.
        is_main_process: whether this is rank 0, which writes the buffers.
        restoring: find the targets of a restore, which also include the buffers on every rank and the masters of
            weights that are fp32 themselves.
    """

    weights_only: bool
    dtype: torch.dtype | None
    is_main_process: bool
    restoring: bool


class OptimizedTensor(NamedTuple):
    """Describe a tensor that the innermost optimizer steps on: a parameter, or a flat partition of those in `names`."""

    group: dict[str, Any]
    tensor: Tensor
    names: list[str]


@dataclass
class LocalShards:
    """Hold the shards of one rank. Strategies whose ranks must communicate override `complete` or `refresh`.

    `sizes`, `members` and `trees` record the structure of model and optimizer, by which `is_current` detects changes.

    Args:
        tensors: every logical tensor, in the same order on every rank, including those without a range on this rank.
        aliases: additional name of a tied tensor -> name under which it is stored.
        groups: (live parameter group, names of its parameters).
        sharded_modules: FSDP2's modules and FSDP1's units, which may temporarily hold unsharded parameters.
        sizes: (container, expected length).
        members: (dictionary, key, expected value); None if the key is missing.
        trees: (state, key, parameter, expected form) of optimizer state that is neither a tensor nor a number.
        forms: parameter -> form of its optimizer state, unless the names in the file determine it.
    """

    tensors: list[TensorShard] = field(default_factory=list)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: list[tuple[Mapping[str, Any], list[str]]] = field(default_factory=list)
    sharded_modules: tuple[Any, ...] = ()
    sizes: list[tuple[Any, int]] = field(default_factory=list)
    members: list[tuple[Any, Any, Any]] = field(default_factory=list)
    trees: list[tuple[Mapping[Any, Any], Any, Tensor, Form]] = field(default_factory=list)
    forms: dict[str, Form] = field(default_factory=dict)

    @classmethod
    def of_model(cls, state: NamedState, sharded_modules: tuple[Any, ...], **more: Any) -> Self:
        """Create an object with the structure of a model, without tensors."""
        return cls(
            aliases=state.aliases,
            sharded_modules=sharded_modules,
            sizes=list(state.sizes),
            members=list(state.members),
            **more,
        )

    def complete(self, collectives: Collectives) -> None:
        """Add the tensors that this rank cannot find without communication. Collective for some strategies."""

    def refresh(self) -> None:
        """Update values derived from the tensors, after a restore has filled them. Collective for some strategies."""

    @property
    def is_current(self) -> bool:
        """Return whether the model and the optimizer still have the recorded structure."""
        (containers, sizes), (mappings, keys, values) = self._columns
        found = map(dict.get, mappings, keys)
        is_same = list(map(len, containers)) == sizes and all(map(operator.is_, found, values))
        return is_same and all(_has_form(*tree) for tree in self.trees)

    @cached_property
    def _columns(self) -> tuple[tuple[list[Any], list[int]], tuple[list[Any], list[Any], list[Any]]]:
        """Store sizes and members as columns: each save compares them, with loops in C."""
        return (
            ([container for container, _ in self.sizes], [size for _, size in self.sizes]),
            (
                [mapping for mapping, _, _ in self.members],
                [key for _, key, _ in self.members],
                [value for _, _, value in self.members],
            ),
        )

    def reshard(self) -> None:
        """Make FSDP hold its sharded parameters, which are those that the optimizer updates.

        After a forward without a backward (an evaluation) FSDP2's root keeps the unsharded parameters, and so does
        FSDP1 if it does not reshard after forward.
        """
        for module in self.sharded_modules:
            module.reshard()

    def owns_parameter(self, parameter: Tensor) -> bool:
        """Return whether a parameter belongs to the model or to a group. Slow."""
        groups = (group["params"] for group, _ in self.groups)
        models = (each.holder[each.key] for each in self.tensors if each.spec.section == "model")
        return any(parameter is each for each in chain(chain.from_iterable(groups), models))

    def frozen_names(self) -> list[str]:
        """List the parameters in groups with requires_grad=False. Groups of flat tensors (FSDP1, ZeRO) are skipped."""
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
        """Return the names of the parameters of each group."""
        return [names for _, names in self.groups]

    def add_state(self, optimizer: Any, names: Sequence[str], values: Mapping[Any, Any], tensor: Tensor) -> list[Leaf]:
        """Record structure and form of the state `values` that an optimizer keeps for `tensor`, and return its leaves.

        `names` are the parameters in the tensor.

        Effects: not collective; main thread, between steps; reads metadata only.

        Raises:
            CheckpointError: if the state has an unsupported structure.
        """
        first = names[0] if names else "a parameter"
        self.sizes.append((values, len(values)))
        for kind, value in values.items():
            if value is None:
                self.members.append((values, kind, None))
            elif not is_leaf(value):
                try:
                    self.trees.append((values, kind, tensor, form_of(value, tensor)))
                except TypeError as error:
                    raise state_error(optimizer, str(kind), first, str(error)) from error
        try:
            form = needed_form(values, tensor)
        except TypeError as error:
            raise state_error(optimizer, ", ".join(map(str, values)), first, str(error)) from error
        if form is not None:
            self.forms.update(dict.fromkeys(names, form))
        return list(leaves_of(values))

    def refuse_ambiguous(self, optimizer: Any, other_names: Iterable[str]) -> None:
        """Check that each name ``<kind>.<parameter>`` of optimizer state is unique and identifies its parameter.

        Raises:
            CheckpointError: with the first ambiguous name.
        """
        names = {each.spec.name for each in self.tensors if each.spec.section == "model"}.union(other_names)
        seen: set[str] = set()
        for each in self.tensors:
            name = each.spec.name
            if each.spec.section != "optimizer":
                continue
            if name in seen or (
                isinstance(each.key, tuple) and split_name(name, names)[0] != ".".join(map(str, each.key))
            ):
                raise CheckpointError(
                    f"{type(optimizer).__name__}: cannot save its state {name!r}: another tensor would have this name; "
                    "rename a parameter, or use checkpoint.save_weights_only"
                )
            seen.add(name)


def _has_form(values: Mapping[Any, Any], kind: Any, tensor: Tensor, form: Form) -> bool:
    try:
        return bool(form_of(values.get(kind), tensor) == form)
    except TypeError:
        return False  # the next plan raises an error with the name


def name_of(parameter: Tensor, names: Mapping[int, str], group_index: int) -> str:
    """Return the name of an optimizer's parameter.

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
    """Map the `id` of each parameter to its name; parameters of other models of the checkpoint are last."""
    own = {id(parameter): name for name, parameter in state.parameters.items()}
    return {**own, **state.others}


def state_error(optimizer: Any, kind: str, name: str, what: str) -> CheckpointError:
    """Return the error for optimizer state that cannot be saved."""
    return CheckpointError(
        f"{type(optimizer).__name__}: cannot save its state {kind!r} of {name}: {what}; "
        "use checkpoint.save_weights_only, or another optimizer"
    )


def innermost(optimizer: Any) -> Any:
    """Return the user's optimizer inside accelerate's and DeepSpeed's wrappers.

    A user's optimizer that wraps another one as ``optimizer``, as Lookahead does, is not unwrapped.
    """
    while (inner := getattr(optimizer, "optimizer", None)) is not None and not _is_users_own(optimizer):
        optimizer = inner
    return optimizer


def _is_users_own(optimizer: Any) -> bool:
    is_accelerates = any(base.__name__ == "AcceleratedOptimizer" for base in type(optimizer).__mro__)
    return isinstance(optimizer, torch.optim.Optimizer) and not is_accelerates


def trained_ids(parameters: Sequence[Tensor], optimizer: Any) -> set[int]:
    """Return the `id` of each parameter that changes in the optimizer's step only."""
    if optimizer is None:
        return {id(parameter) for parameter in parameters if parameter.requires_grad}
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
