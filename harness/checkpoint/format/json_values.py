"""Python values as strict JSON, and back: what schedulers and scalers hold, without pickle.

JSON has no infinity (`ReduceLROnPlateau` begins with one), no keys but text (`MultiStepLR` counts by
number) and no tuples. What it lacks stands as an object with one key that begins with ``$``. Tensors of more
than one element are kept elsewhere and referred to (`harness.checkpoint.state.kept_tensors`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MARK = "$"
# Python neither writes nor reads an int of more than 4,300 decimal digits as text.
_MAX_INT_BITS = 14_000
# Keeps a tensor elsewhere, and gives the JSON value that stands for it; and finds it again.
Put = Callable[[Tensor], Any]
Get = Callable[[Any], Tensor]


class UnsavableTensor(TypeError):
    """A tensor that cannot be kept."""


def encode(value: Any, put: Put | None = None) -> Any:
    """The value as JSON can hold it; copied, so that it stays as it is now.

    Effects: not collective; any thread; a tensor on CUDA is waited for; nothing on disk.

    Args:
        value: numbers, text, None, lists, tuples, deques, sets, dicts, Counters, torch's types, tensors, of these.
        put: keeps tensors that are no single number on the host; None: there may be none.

    Raises:
        UnsavableTensor: from `put`.
        TypeError: if something in it is of another type.
    """
    inside = partial(encode, put=put)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        if value.bit_length() > _MAX_INT_BITS:
            raise TypeError(f"an int of {value.bit_length()} bits is too long to be written as text")
        return int(value)
    if isinstance(value, float):  # numpy's doubles are too
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [inside(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [inside(item) for item in value]}
    if isinstance(value, deque):
        return {"$deque": [[inside(item) for item in value], value.maxlen]}
    if isinstance(value, (set, frozenset)):
        return {"$set": [inside(item) for item in value]}
    if isinstance(value, Counter):
        return {"$counter": _items(value, inside)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith(_MARK) for key in value):
            return {key: inside(item) for key, item in value.items()}
        return {"$dict": _items(value, inside)}
    if isinstance(value, torch.dtype):
        return {"$dtype": _name_of(value)}
    if isinstance(value, Tensor):
        if value.numel() == 1 and (put is None or (type(value) is Tensor and value.device.type == "cpu")):
            return {"$tensor": [encode(value.item()), _name_of(value.dtype), list(value.shape)]}
        if put is not None:
            return {"$stored": put(value)}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item())  # one of numpy's numbers
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is no number, text or list of these")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _items(value: Mapping[Any, Any], inside: Callable[[Any], Any]) -> list[list[Any]]:
    return [[inside(key), inside(item)] for key, item in value.items()]


def decode(value: Any, get: Get | None = None) -> Any:
    """What `encode` was given.

    Effects: not collective; any thread; nothing on disk.

    Args:
        value: JSON.
        get: finds what `put` has kept; None: nothing was.

    Raises:
        ValueError: if it is not of `encode`'s making.
    """
    try:
        return _decode(value, get)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _decode(value: Any, get: Get | None) -> Any:
    if isinstance(value, list):
        return [_decode(item, get) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next((key for key in value if key.startswith(_MARK)), None)
    if mark is None:
        return {key: _decode(item, get) for key, item in value.items()}
    content = value[mark]
    try:
        if len(value) == 1 and mark == "$stored" and get is not None:
            return get(content)
        if len(value) == 1:
            return _MADE[mark](content, get)
    except RecursionError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{mark}: is not understood: {str(content)[:200]}") from error
    raise ValueError(f"{mark}: stands beside other keys")


def _float(content: Any, _: Get | None) -> float:
    # Those that JSON has stand as such.
    if content not in ("inf", "-inf", "nan"):
        raise TypeError(content)
    return float(content)


def _items_of(content: Any, get: Get | None) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(content)
    return [_decode(item, get) for item in content]


def _deque(content: Any, get: Get | None) -> deque[Any]:
    items, maxlen = content
    if not (maxlen is None or (type(maxlen) is int and maxlen >= len(items))):
        raise TypeError(maxlen)
    return deque(_items_of(items, get), maxlen)


def _dtype(name: Any, _: Get | None) -> torch.dtype:
    kind = getattr(torch, name)
    if not isinstance(kind, torch.dtype):
        raise TypeError(name)
    return kind


def _tensor(content: Any, get: Get | None) -> Tensor:
    number, dtype, shape = content
    kind = _dtype(dtype, get)
    if not isinstance(shape, list) or any(type(length) is not int or length != 1 for length in shape):
        raise TypeError(shape)
    value = _decode(number, None)
    if not isinstance(value, (bool, int, float)):
        raise TypeError(value)
    return torch.tensor(value, dtype=kind).reshape(shape)


def _dict(content: Any, get: Get | None) -> dict[Any, Any]:
    if not isinstance(content, list):
        raise TypeError(content)
    return {_decode(key, get): _decode(item, get) for key, item in content}


_MADE: dict[str, Callable[[Any, Get | None], Any]] = {
    "$float": _float,
    "$tuple": lambda content, get: tuple(_items_of(content, get)),
    "$deque": _deque,
    "$set": lambda content, get: set(_items_of(content, get)),
    "$counter": lambda content, get: Counter(_dict(content, get)),
    "$dict": _dict,
    "$dtype": _dtype,
    "$tensor": _tensor,
}
