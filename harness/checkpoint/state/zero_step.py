"""Step an optimizer without side effects, to get the state that it creates for a tensor."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint.sharding.local_shards import OptimizedTensor
from harness.errors import CheckpointError


def zero_step(optimizer: Any, wanted: Sequence[OptimizedTensor]) -> list[dict[Any, Any]]:
    """Make a first step of the innermost optimizer with zero gradients and learning rate; return the tensors' states.

    The step starts without state of these tensors. If it fails, it is retried with a copy of the existing state,
    because some optimizers create their state in ``__init__``.

    Effects: as the optimizer's step, which is rarely collective; main thread, between steps. State, groups, attributes
    (numbers, tensors and containers of these) and random states are restored; the optimizer's hooks are not called.
    The tensors' values are not restored.

    Raises:
        CheckpointError: if the step fails.
    """
    try:
        return _zero_step(optimizer, wanted, {})
    except CheckpointError:
        states = {each.tensor: state for each in wanted if (state := optimizer.state.get(each.tensor))}
        if not states:
            raise
        return _zero_step(optimizer, wanted, states)


def _zero_step(
    optimizer: Any, wanted: Sequence[OptimizedTensor], states: Mapping[Tensor, dict[Any, Any]]
) -> list[dict[Any, Any]]:
    step = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    devices = {each.tensor.device for each in wanted if each.tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices), _preserved(optimizer, [each.tensor for each in wanted]):
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for group in optimizer.param_groups:
            group["params"] = [each.tensor for each in wanted if each.group is group]
        # Keep existing gradients: DeepSpeed sets its own if the optimizer is offloaded.
        gradients = [each.tensor.grad for each in wanted]
        try:
            for each in wanted:
                each.tensor.grad = torch.zeros_like(each.tensor)
            optimizer.state.update({tensor: copy.deepcopy(state) for tensor, state in states.items()})
            step(optimizer)
            return [optimizer.state.pop(each.tensor, {}) for each in wanted]
        except Exception as error:
            raise CheckpointError(
                f"{type(optimizer).__name__}: cannot make its state before training: {error}; use another "
                "optimizer, or restore the weights only"
            ) from error
        finally:
            for each, gradient in zip(wanted, gradients, strict=True):
                each.tensor.grad = gradient


@contextmanager
def _preserved(optimizer: Any, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore an optimizer's groups, attributes, and state of some tensors on exit.

    Inside, the optimizer works on copies, so in-place changes do not reach the originals.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    attributes = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    # All calls share `copies`, so that a value shared by a group and an attribute has one copy.
    copies: dict[int, Any] = {}
    for group in optimizer.param_groups:
        group.update({key: _copied(value, copies) for key, value in group.items() if key != "params"})
    vars(optimizer).update({name: _copied(value, copies) for name, value in attributes.items()})
    states = {tensor: optimizer.state.pop(tensor, None) for tensor in tensors}
    hooks = [getattr(optimizer, name, {}) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")]
    registered = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    shared = {key: copy.deepcopy(value) for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    try:
        yield
    finally:
        for each, before in zip(hooks, registered, strict=True):
            each.update(before)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        for name in [name for name in vars(optimizer) if name not in (*attributes, "state", "param_groups")]:
            delattr(optimizer, name)
        vars(optimizer).update(attributes)
        for key in [key for key in optimizer.state if not isinstance(key, Tensor)]:
            del optimizer.state[key]
        optimizer.state.update(shared)
        for tensor, state in states.items():
            optimizer.state.pop(tensor, None)
            if state is not None:
                optimizer.state[tensor] = state


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Deep-copy tensors and containers, but not parameters and objects. `copies` maps `id` of a value to its copy."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor):
        copied: Any = value if isinstance(value, nn.Parameter) else value.detach().clone()
    elif isinstance(value, dict):
        copied = copies[id(value)] = copy.copy(value)
        for key, item in value.items():  # a Counter's `update` would add
            copied[key] = _copied(item, copies)
    elif isinstance(value, (list, deque)):
        copied = copies[id(value)] = copy.copy(value)
        for index, item in enumerate(value):
            copied[index] = _copied(item, copies)
    elif type(value) is tuple:
        copied = tuple(_copied(item, copies) for item in value)
    elif type(value) is set:
        copied = set(value)
    else:
        copied = value
    copies[id(value)] = copied
    return copied
