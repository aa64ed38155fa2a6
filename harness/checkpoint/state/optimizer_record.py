"""Encode and decode the record of an optimizer in ``trainer_state.json``.

    "param_groups"  hyperparameters of its groups, without the parameters
    "class"         class of the innermost optimizer, to detect another one
    "frozen"        parameters in its groups whose requires_grad was False
    "forms"         each distinct form of a state that is more than a dict of tensors, with its parameters
    "state"         state under keys that are not parameters
    "added"         entries of an overridden `state_dict()` besides state and groups, for its `load_state_dict()`

The last three are omitted if empty. Checkpoints of earlier versions have only the groups.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from harness.checkpoint.format.json_values import Get, UnsavableTensor, decode, encode
from harness.checkpoint.sharding.local_shards import LocalShards, innermost
from harness.checkpoint.sharding.state_form import Form, checked, is_object
from harness.checkpoint.state.kept_tensors import KeptTensors
from harness.errors import CheckpointError

# Types of immutable values in a parameter group.
_CONSTANTS = (Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, DeviceMesh, dist.ProcessGroup)


@dataclass(frozen=True)
class OptimizerRecord:
    """Hold the decoded record, without groups.

    Args:
        class_name: module and name of the class; None if unknown or without an optimizer.
        forms: parameter -> form of its state, unless the names in the file determine it.
        state: state under keys that are not parameters.
        added: entries of an overridden `state_dict`.
    """

    class_name: str | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)
    state: Mapping[Any, Any] = field(default_factory=dict)
    added: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Mapping[str, Any], get: Get | None = None) -> OptimizerRecord:
        """Decode a result of `record_of`, with the ``forms`` of `groups_record`.

        Raises:
            ValueError: if a value has an unexpected type.
        """
        name = record.get("class")
        if not (name is None or isinstance(name, str)):
            raise ValueError("the optimizer's class is not a text")
        state, added = (decode(record.get(key, {}), get) for key in ("state", "added"))
        if not isinstance(state, dict) or not isinstance(added, dict):
            raise ValueError("the optimizer's state, or what it has added, is not an object")
        return cls(name, _forms(record.get("forms", [])), state, added)


def groups_record(shards: LocalShards, kept: KeptTensors) -> dict[str, Any]:
    """Encode the hyperparameters of all optimizers' groups, and the forms of their states, as JSON values.

    Effects: as `record_of`.

    Raises:
        CheckpointError: if a value cannot be saved.
    """
    groups = [_hyperparameters(number, group, shards, kept) for number, (group, _) in enumerate(shards.groups)]
    record: dict[str, Any] = {"param_groups": groups, "frozen": shards.frozen_names()}
    if shards.forms:
        distinct: dict[str, dict[str, Any]] = {}
        for name, form in shards.forms.items():
            entry = distinct.setdefault(json.dumps(form), {"form": form, "parameters": []})
            entry["parameters"].append(name)
        record["forms"] = list(distinct.values())
    return record


def _hyperparameters(number: int, group: Mapping[str, Any], shards: LocalShards, kept: KeptTensors) -> dict[str, Any]:
    """Encode the values of a parameter group, except values that the code recreates (`_is_made_by_code`)."""
    values = {}
    for key, value in group.items():
        if key == "params":
            continue
        try:
            values[key] = encode(value, kept.put)
        except UnsavableTensor as error:
            raise CheckpointError(
                f"optimizer: {key!r} of parameter group {number} cannot be saved: it has {error}; use "
                "checkpoint.save_weights_only, or another optimizer"
            ) from error
        except TypeError as error:
            if not _is_made_by_code(value, shards):
                raise CheckpointError(
                    f"optimizer: {key!r} of parameter group {number} cannot be saved: {error}; make it a number, a "
                    "tensor or a container of these, or use checkpoint.save_weights_only"
                ) from error
    return values


def _is_made_by_code(value: Any, shards: LocalShards) -> bool:
    """Return whether a value has no state, so that the code that constructs the optimizer recreates it.

    These are functions, classes, constants, device handles, the model's parameters, and containers of these.
    """
    if value is None or isinstance(value, (str, bool)):
        return True
    if isinstance(value, nn.Parameter):
        return shards.owns_parameter(value)
    if isinstance(value, Mapping):
        return all(_is_made_by_code(item, shards) for item in value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_made_by_code(item, shards) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return bool(getattr(type(value), "__dataclass_params__").frozen)  # noqa: B009
    return isinstance(value, _CONSTANTS) or (callable(value) and not is_object(value))


def record_of(optimizer: Any, added: Mapping[str, Any], kept: KeptTensors) -> dict[str, Any]:
    """Encode the class of an optimizer, its state that belongs to no parameter, and the result of `added_state`.

    Effects: not collective; main thread, between steps; copies tensors that belong to no parameter to `kept`.

    Raises:
        CheckpointError: if a value cannot be saved.
    """
    inner = innermost(optimizer)
    if inner is None:
        return {}
    record: dict[str, Any] = {"class": class_name(inner)}
    if shared := _shared_state(inner):
        record["state"] = {
            "$dict": [[encode(key), _encoded(inner, f"state[{key!r}]", shared[key], kept)] for key in shared]
        }
    if added:
        record["added"] = {key: _encoded(inner, f"state_dict()[{key!r}]", added[key], kept) for key in added}
    return record


def added_state(optimizer: Any) -> Mapping[str, Any]:
    """Return the entries besides state and groups that an overridden `state_dict` adds.

    Effects: calls an overridden `state_dict`, which may be collective, so call this on every rank; main thread, between
    steps.

    Raises:
        CheckpointError: if `state_dict` does not return a mapping with str keys.
    """
    if not has_own_state_dict(optimizer):
        return {}
    inner = innermost(optimizer)
    with _listed_state(inner):
        state = inner.state_dict()
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise CheckpointError(
            f"{type(inner).__name__}: its state_dict() is not a dict with text as keys, so it cannot be saved; use "
            "checkpoint.save_weights_only, or another optimizer"
        )
    return {key: value for key, value in state.items() if key not in ("state", "param_groups")}


def has_own_state_dict(optimizer: Any) -> bool:
    """Return whether the innermost optimizer overrides `state_dict`, which may then be collective."""
    inner = innermost(optimizer)
    own = None if inner is None else getattr(type(inner), "state_dict", None)
    return own not in (None, torch.optim.Optimizer.state_dict)


def restore_optimizer_extras(optimizer: Any, record: OptimizerRecord) -> None:
    """Restore the state that belongs to no parameter, after tensors and groups are restored.

    Effects: calls `load_state_dict` if the record has added entries, which may be collective, so call this on every
    rank; main thread.
    """
    inner = innermost(optimizer)
    if inner is None:
        return
    # Copy the values: the optimizer changes them, and this may be called again.
    inner.state.update(copy.deepcopy(dict(record.state)))
    if record.added:
        _load_added(inner, copy.deepcopy(dict(record.added)))


def has_unrecorded(optimizer: Any) -> bool:
    """Return whether an optimizer has state that belongs to no parameter. Effects: as `added_state`."""
    inner = innermost(optimizer)
    return inner is not None and bool(_shared_state(inner) or added_state(inner))


def _load_added(inner: Any, added: dict[str, Any]) -> None:
    # torch's load_state_dict replaces the groups and casts the state to the parameters' types; undo both.
    state, groups = inner.state, inner.param_groups
    indices: dict[int, int] = {}
    packed_groups = [
        {**group, "params": [indices.setdefault(id(each), len(indices)) for each in group["params"]]}
        for group in groups
    ]
    packed = {indices.get(id(key), key) if isinstance(key, Tensor) else key: value for key, value in state.items()}
    try:
        inner.load_state_dict({"state": packed, "param_groups": packed_groups, **added})
    finally:
        holder = _holder(inner)
        loaded, holder.state, holder.param_groups = holder.state, state, groups
    state.update(_not_of_parameters(loaded))


@contextmanager
def _listed_state(inner: Any) -> Iterator[None]:
    """Hide state of tensors in no group, on which torch's `state_dict` fails: ZeRO-3's groups are empty."""
    listed = {id(each) for group in inner.param_groups for each in group["params"]}
    shown = {key: value for key, value in inner.state.items() if not isinstance(key, Tensor) or id(key) in listed}
    if len(shown) == len(inner.state):
        yield
        return
    holder, state = _holder(inner), inner.state
    holder.state = defaultdict(dict, shown)
    try:
        yield
    finally:
        holder.state = state


def _holder(optimizer: Any) -> Any:
    """Return the optimizer that holds the state: a wrapper may expose the inner one's state as a property."""
    while isinstance(getattr(type(optimizer), "state", None), property):
        optimizer = optimizer.optimizer
    return optimizer


def _shared_state(inner: Any) -> dict[Any, Any]:
    return _not_of_parameters(inner.state)


def _not_of_parameters(state: Mapping[Any, Any]) -> dict[Any, Any]:
    # Each save calls this for thousands of parameters; mapping `type` loops in C.
    kinds = {kind for kind in set(map(type, state)) if not issubclass(kind, Tensor)}
    return {key: value for key, value in state.items() if type(key) in kinds} if kinds else {}


def _encoded(inner: Any, place: str, value: Any, kept: KeptTensors) -> Any:
    try:
        return encode(value, kept.put)
    except TypeError as error:
        raise CheckpointError(
            f"{type(inner).__name__}: cannot save its {place}: {error}; use checkpoint.save_weights_only, or another "
            "optimizer"
        ) from error


def check_step(optimizer: Any) -> None:
    """Check that an optimizer's step does not need a closure, which calls forward and backward.

    Raises:
        CheckpointError: on every rank, if its step requires a closure.
    """
    # Inspect the class: schedulers and accelerate replace the method in the instance. A Keras optimizer has no step.
    kind = type(innermost(optimizer))
    step = getattr(kind, "step", None)
    if step is None:
        return
    closure = inspect.signature(step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CheckpointError(
            f"{kind.__name__}: its step needs a closure, and training with it cannot be resumed; use "
            "checkpoint.save_weights_only: true, or another optimizer"
        )


def class_name(optimizer: Any) -> str:
    """Return module and qualified name of an optimizer's class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _forms(entries: Any) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    if not isinstance(entries, list):
        raise ValueError("forms is not a list")
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"form", "parameters"}:
            raise ValueError("an entry of forms is not a form and its parameters")
        form, names = checked(entry["form"]), entry["parameters"]
        if not isinstance(form, dict) or form.keys() != {"dict"}:
            raise ValueError("the form of an optimizer's state is not a dict")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the parameters of a form are not names")
        forms |= dict.fromkeys(names, form)
    return forms
