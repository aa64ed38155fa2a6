"""A step of an optimizer that leaves no trace, to learn what the optimizer keeps for a tensor."""

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
    """What an optimizer keeps of some tensors after its first step, taken with gradients of zero at a rate of zero.

    Effects: as the optimizer's step, which is not collective for most; main thread, between steps. Its state, groups,
    attributes (numbers, tensors and containers of these) and random numbers are as before when this returns; its own
    hooks are not called.

    The step starts without a state of these tensors. Where that fails, a second one starts with a copy of the state
    that is there: some optimizers make their state in ``__init__``.

    Args:
        optimizer: the user's own, inside all wrappers.
        wanted: of what it steps on.

    Raises:
        CheckpointError: if the optimizer cannot step so.
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
    with torch.random.fork_rng(devices), _kept(optimizer, [each.tensor for each in wanted]):
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for group in optimizer.param_groups:
            group["params"] = [each.tensor for each in wanted if each.group is group]
        # DeepSpeed keeps gradients of its own where the optimizer is offloaded.
        gradients = [each.tensor.grad for each in wanted]
        try:
            for each in wanted:
                each.tensor.grad = torch.zeros_like(each.tensor)
            optimizer.state.update({tensor: copy.deepcopy(state) for tensor, state in states.items()})
            step(optimizer)
            return [optimizer.state.pop(each.tensor, {}) for each in wanted]
        except Exception as error:
            raise CheckpointError(
                f"{type(optimizer).__name__}: cannot make its state before training: {error}; it cannot be resumed"
            ) from error
        finally:
            for each, gradient in zip(wanted, gradients, strict=True):
                each.tensor.grad = gradient


@contextmanager
def _kept(optimizer: Any, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore an optimizer's groups, attributes and state of some tensors at the end.

    Meanwhile the optimizer has copies, so that neither a new value nor a change in place reaches its own.
    """
    groups = [dict(group) for group in optimizer.param_groups]
    attributes = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    # One `copies` for all: what a group and an attribute share, their copies share too.
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
    """A copy of a tensor or of a container, with copies of the tensors and containers in it; else the value itself.

    Parameters and objects are not copied.

    Args:
        value: any.
        copies: identity of a value -> its copy; each value is copied once.
    """
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
