"""An optimizer's state before its first step, so that there is something to read a checkpoint into.

The optimizer itself makes it, in a step with gradients of zero at a rate of zero: types, devices and what is
a plain number are its own choice. The values are of no use, so of many parameters that are alike in all that an
optimizer could go by, one is stepped on and the others get memory of the same form: writing zeros, and
the arithmetic on them, takes longer than reading the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.huge_pages import advise_huge_pages
from harness.checkpoint.shards.held import Stepped
from harness.errors import CheckpointError

_GRADIENT_BYTES = 64 << 20


def materialize(optimizer: torch.optim.Optimizer, wanted: Iterable[Stepped]) -> list[Tensor]:
    """Have the innermost optimizer make its state for some of what it steps on.

    Effects: as the optimizer's step, which is not collective for most; main thread, before training; blocks
    for that step; at most 64 MiB of gradients at a time, or as much as the largest tensor has.

    Args:
        optimizer: the user's own, inside all wrappers.
        wanted: what has a state already is left as it is.

    Returns:
        The tensors that have a state now and had none before. After an error they have none again.

    Raises:
        CheckpointError: if the optimizer cannot step so.
    """
    made = [each for each in wanted if not optimizer.state.get(each.tensor)]
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    members = [(group, group["params"]) for group in optimizer.param_groups]
    try:
        for group, rate in rates:
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        alike: dict[Any, list[Stepped]] = {}
        for each in made:
            alike.setdefault(_form(each), []).append(each)
        for part in _parts(same[0] for same in alike.values()):
            _step(optimizer, part)
        for part in _parts(each for same in alike.values() for each in same[1:] if not _copy(optimizer, same[0], each)):
            _step(optimizer, part)
    except (TypeError, RuntimeError, AttributeError, KeyError) as error:
        forget(optimizer, [each.tensor for each in made])
        raise CheckpointError(
            f"{type(optimizer).__name__}: cannot make its state before training: {error}; it cannot be resumed"
        ) from error
    finally:
        for group, rate in rates:
            group["lr"] = rate
        for group, parameters in members:
            group["params"] = parameters
    for each in made:
        # In the order that they would have come in; a look into a defaultdict has left an entry for nothing.
        if state := optimizer.state.pop(each.tensor, None):
            optimizer.state[each.tensor] = state
    return [each.tensor for each in made if each.tensor in optimizer.state]


def forget(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor]) -> None:
    """Take the state of some tensors away, as before the first step."""
    for tensor in tensors:
        optimizer.state.pop(tensor, None)


def _form(each: Stepped) -> Any:
    """All that an optimizer could go by when it makes a state; of its own for a flat partition, where zeros count."""
    tensor = each.tensor
    if len(each.names) > 1 or getattr(tensor, "_is_flat_param", False):
        return id(tensor)
    kind = (type(tensor), tensor.dtype, tensor.shape, getattr(tensor, "placements", None), tensor.requires_grad)
    return id(each.group), kind, _place(tensor)


def _place(tensor: Tensor) -> Any:
    local = getattr(tensor, "_local_tensor", tensor)
    return local.shape, local.stride(), local.device


def _copy(optimizer: torch.optim.Optimizer, first: Stepped, each: Stepped) -> bool:
    """Give a state of the form that another has; whether it is of a kind that can be told from its values."""
    state: dict[Any, Any] = {}
    for kind, value in optimizer.state.get(first.tensor, {}).items():
        if value is None or isinstance(value, bool | int | float):
            state[kind] = value
        elif not isinstance(value, Tensor):
            return False
        elif not value.shape and first.tensor.numel() > 1 and type(value) is Tensor:
            state[kind] = value.clone()
        elif _place(value) == _place(first.tensor):
            state[kind] = torch.empty_like(each.tensor, dtype=value.dtype, requires_grad=False)
            advise_huge_pages(getattr(state[kind], "_local_tensor", state[kind]))
            if type(state[kind]) is not type(value):
                return False
        else:
            return False
    if state:
        optimizer.state[each.tensor] = state
    return True


def _step(optimizer: Any, part: list[Stepped]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [each.tensor for each in part if each.group is group]
    # DeepSpeed keeps gradients of its own where the optimizer is offloaded.
    before = [each.tensor.grad for each in part]
    try:
        for each in part:
            each.tensor.grad = torch.zeros_like(each.tensor)
        optimizer.step()
    finally:
        for each, gradient in zip(part, before, strict=True):
            each.tensor.grad = gradient


def _parts(wanted: Iterable[Stepped]) -> Iterator[list[Stepped]]:
    part: list[Stepped] = []
    for each in wanted:
        part.append(each)
        if sum(one.tensor.nbytes for one in part) >= _GRADIENT_BYTES:
            yield part
            part = []
    if part:
        yield part
