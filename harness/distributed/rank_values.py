"""Encode values for other ranks as JSON and tensor bytes. Received data cannot execute code.

    8 bytes: length of the JSON text | JSON text | bytes of the 1st blob | of the 2nd | ...

JSON represents numbers, text, None and lists directly. Everything else is an object with one key:

    tuple, set, dict, path   the items, or the text of the path
    bytes                    their number; the next blob contains them
    tensor                   dtype, shape and number of bytes; the next blob contains its data
    record                   full name of a dataclass or named tuple of harness, and its fields; or of a class of
                             harness that defines `__getnewargs__`, and these arguments
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LENGTH_BYTES = 8
_PACKAGE = "harness."


def encode(value: Any) -> bytearray:
    """Encode a value that consists of the types in the module's docstring, with dense tensors.

    A value of a subclass, such as `OrderedDict`, is decoded as the base class.

    Effects: not collective; any thread; synchronizes with CUDA for its tensors.

    Raises:
        TypeError: if it contains another type.
    """
    blobs: list[bytes] = []
    text = json.dumps(_encode(value, blobs), separators=(",", ":")).encode()
    return bytearray().join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *blobs])


def decode(data: bytes | bytearray) -> Any:
    """Decode the result of `encode`; tensors are on the CPU.

    Raises:
        ValueError: if `encode` did not produce the data.
    """
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        return _decode(json.loads(bytes(data[_LENGTH_BYTES:end])), _Blobs(data, end))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ValueError(f"a value from another rank cannot be decoded: {error}") from error


def _encode(value: Any, blobs: list[bytes]) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list):
        return [_encode(item, blobs) for item in value]
    if isinstance(value, (bytes, bytearray)):
        blobs.append(bytes(value))
        return {"bytes": len(value)}
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1)
        blobs.append(data.view(torch.uint8).numpy().tobytes())
        return {"tensor": [str(value.dtype).removeprefix("torch."), list(value.shape), len(blobs[-1])]}
    return _encode_structure(value, blobs)


def _encode_structure(value: Any, blobs: list[bytes]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"record": [_name_of(type(value)), [_encode(item, blobs) for item in value]]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, blobs) for item in value]}
    if isinstance(value, (set, frozenset)):
        return {"set": [_encode(item, blobs) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(key, blobs), _encode(item, blobs)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if dataclasses.is_dataclass(value):
        fields = [_encode(getattr(value, field.name), blobs) for field in dataclasses.fields(value)]
        return {"record": [_name_of(type(value)), fields]}
    if "__getnewargs__" in vars(type(value)):
        return {"record": [_name_of(type(value)), [_encode(item, blobs) for item in value.__getnewargs__()]]}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _encode(value.item(), blobs)  # a NumPy scalar
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} cannot be sent to another rank")


def _name_of(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not name.startswith(_PACKAGE):
        raise TypeError(f"{name} cannot be sent to another rank: it is not a class of harness")
    return name


class _Blobs:
    """Reads the blobs, which follow the JSON text, in order."""

    def __init__(self, data: bytes | bytearray, start: int) -> None:
        self._data = data
        self._position = start

    def read(self, count: int) -> bytearray:
        data = bytearray(self._data[self._position : self._position + count])
        if type(count) is not int or len(data) != count:
            raise ValueError("is truncated")
        self._position += count
        return data


def _decode(value: Any, blobs: _Blobs) -> Any:
    if isinstance(value, list):
        return [_decode(item, blobs) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _DECODERS[kind](content, blobs)


def _decode_tensor(content: Any, blobs: _Blobs) -> Tensor:
    name, shape, size_bytes = content
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is not a type of tensors")
    data = blobs.read(size_bytes)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def _decode_record(content: Any, blobs: _Blobs) -> Any:
    name, values = content
    module, _, class_name = name.rpartition(".")
    if not module.startswith(_PACKAGE):
        raise TypeError(f"{name} is not a class of harness")
    found = getattr(importlib.import_module(module), class_name)
    if not isinstance(found, type) or not (
        dataclasses.is_dataclass(found)
        or (issubclass(found, tuple) and hasattr(found, "_fields"))
        or "__getnewargs__" in vars(found)
    ):
        raise TypeError(f"{name} is not a record")
    return found(*(_decode(item, blobs) for item in values))


_DECODERS: dict[str, Callable[[Any, _Blobs], Any]] = {
    "tuple": lambda content, blobs: tuple(_decode(item, blobs) for item in content),
    "set": lambda content, blobs: {_decode(item, blobs) for item in content},
    "dict": lambda content, blobs: {_decode(key, blobs): _decode(item, blobs) for key, item in content},
    "bytes": lambda content, blobs: bytes(blobs.read(content)),
    "path": lambda content, _: Path(content),
    "tensor": _decode_tensor,
    "record": _decode_record,
}
