"""Encode Python values, such as the state of schedulers and scalers, as strict JSON and decode them, without pickle.

JSON lacks infinity (the initial value of `ReduceLROnPlateau`), numbers as keys (used by `MultiStepLR`) and tuples. Such
a value becomes an object with one key that begins with ``$``. Tensors of more than one element are stored elsewhere and
referenced (`harness.checkpoint.state.kept_tensors`).
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
# Python does not convert an int of more than 4,300 decimal digits to or from text.
_MAX_INT_BITS = 14_000
# Store a tensor elsewhere and return a JSON reference to it; return the tensor of a reference.
Put = Callable[[Tensor], Any]
Get = Callable[[Any], Tensor]


class UnsavableTensor(TypeError):
    """A tensor cannot be stored."""


def encode(value: Any, put: Put | None = None) -> Any:
    """Encode a value as JSON.

    Effects: not collective; any thread; synchronizes with CUDA for a CUDA tensor.

    Args:
        value: a number, str, None, torch.dtype or tensor, or a list, tuple, deque, set, dict or Counter of these.
        put: stores every tensor except one-element CPU tensors; if None, tensors of several elements are refused.

    Raises:
        UnsavableTensor: from `put`.
        TypeError: if a value has another type.
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
        return encode(value.item())  # a number of numpy
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is not a number, a text or a list of these")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _items(value: Mapping[Any, Any], inside: Callable[[Any], Any]) -> list[list[Any]]:
    return [[inside(key), inside(item)] for key, item in value.items()]


def decode(value: Any, get: Get | None = None) -> Any:
    """Decode a result of `encode`. `get` returns the tensors that `put` stored; if None, references are refused.

    Raises:
        ValueError: if `encode` cannot have written it.
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
        raise ValueError(f"{mark}: cannot be decoded: {str(content)[:200]}") from error
    raise ValueError(f"{mark}: is not the only key")


def _float(content: Any, _: Get | None) -> float:
    # `encode` writes finite numbers as plain JSON.
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
