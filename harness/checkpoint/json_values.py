"""Python values as strict JSON, and back: what schedulers and scalers hold, without pickle.

JSON has no infinity (`ReduceLROnPlateau` begins with one), no keys but text (`MultiStepLR` counts by
number) and no tuples. What it lacks stands as an object with one key that begins with ``$``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

_MARK = "$"


def encode(value: Any) -> Any:
    """The value as JSON can hold it; copied, so that it stays as it is now.

    Effects: not collective; any thread; a tensor on CUDA is waited for; nothing on disk.

    Args:
        value: numbers, text, None, lists, tuples, sets, dicts, Counters, tensors of one element, of these.

    Raises:
        TypeError: if something in it is of another type.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):  # numpy's doubles are too
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, tuple):
        return {"$tuple": [encode(item) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"$set": [encode(item) for item in value]}
    if isinstance(value, Counter):
        return {"$counter": _items(value)}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith(_MARK) for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"$dict": _items(value)}
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return {"$tensor": [encode(value.item()), str(value.dtype).removeprefix("torch."), list(value.shape)]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item())  # one of numpy's numbers
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is no number, text or list of these")


def _items(value: Mapping[Any, Any]) -> list[list[Any]]:
    return [[encode(key), encode(item)] for key, item in value.items()]


def decode(value: Any) -> Any:
    """What `encode` was given.

    Effects: not collective; any thread; nothing on disk.

    Raises:
        ValueError: if it is not of `encode`'s making.
    """
    try:
        return _decode(value)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    mark = next((key for key in value if key.startswith(_MARK)), None)
    if mark is None:
        return {key: _decode(item) for key, item in value.items()}
    content = value[mark]
    try:
        if len(value) == 1:
            return _MADE[mark](content)
    except RecursionError:
        raise
    except (KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{mark}: is not understood: {str(content)[:200]}") from error
    raise ValueError(f"{mark}: stands beside other keys")


def _float(content: Any) -> float:
    # Those that JSON has stand as such.
    if content not in ("inf", "-inf", "nan"):
        raise TypeError(content)
    return float(content)


def _items_of(content: Any) -> list[Any]:
    if not isinstance(content, list):
        raise TypeError(content)
    return [_decode(item) for item in content]


def _tensor(content: Any) -> torch.Tensor:
    number, dtype, shape = content
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype):
        raise TypeError(dtype)
    if not isinstance(shape, list) or any(type(length) is not int or length != 1 for length in shape):
        raise TypeError(shape)
    value = _decode(number)
    if not isinstance(value, (bool, int, float)):
        raise TypeError(value)
    return torch.tensor(value, dtype=kind).reshape(shape)


def _dict(content: Any) -> dict[Any, Any]:
    if not isinstance(content, list):
        raise TypeError(content)
    return {_decode(key): _decode(item) for key, item in content}


_MADE: dict[str, Callable[[Any], Any]] = {
    "$float": _float,
    "$tuple": lambda content: tuple(_items_of(content)),
    "$set": lambda content: set(_items_of(content)),
    "$counter": lambda content: Counter(_dict(content)),
    "$dict": _dict,
    "$tensor": _tensor,
}
