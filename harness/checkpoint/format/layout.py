"""Compute the file and byte offset of each tensor from names, types and shapes.

The safetensors header fixes every offset before any data is written. Every rank computes the same layout and writes to
it without communication. Format: https://github.com/huggingface/safetensors#format. This module never imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.files import Files, LocalFiles
from harness.errors import CheckpointError, DamagedError

Section = Literal["model", "optimizer"]
Key = tuple[Section, str]

# Type -> bytes of an element. `safetensors.serialize` sorts tensors in this order, then by name.
ITEM_BYTES = {
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "U16": 2,
    "I16": 2,
    "F8_E5M2FNUZ": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E8M0": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_ORDER = {dtype: position for position, dtype in enumerate(ITEM_BYTES)}
_HEADER_ALIGNMENT = 8
_PREFIX_BYTES = 8
_HEADER_LIMIT_BYTES = 100_000_000  # safetensors' own


@dataclass(frozen=True)
class TensorSpec:
    """Describe one logical (unsharded) tensor in a file. `dtype` is safetensors' name of the type, such as ``F32``."""

    section: Section
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def key(self) -> Key:
        """Return the unique name in the checkpoint."""
        return self.section, self.name

    @property
    def item_bytes(self) -> int:
        """Return the bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @cached_property
    def num_items(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the data."""
        return self.num_items * self.item_bytes


@dataclass(frozen=True)
class FileLayout:
    """Describe one safetensors file: its `header` is all bytes before the data, its `tensors` are in data order."""

    name: str
    header: bytes
    size_bytes: int
    tensors: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Layout:
    """Describe all safetensors files of a checkpoint.

    Args:
        files: weights first, then the optimizer.
        places: tensor -> (index into `files`, byte offset of its data in that file).
        index: content of ``model.safetensors.index.json``; None if one file holds all weights.
    """

    files: tuple[FileLayout, ...]
    places: Mapping[Key, tuple[int, int]]
    index: Mapping[str, Any] | None

    @property
    def size_bytes(self) -> int:
        """Return the total bytes of all files."""
        return sum(file.size_bytes for file in self.files)


class StoredTensor(NamedTuple):
    """Describe one tensor of a file on disk; its data are the bytes `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(
    path: Path, record: FileRecord | None = None, files: Files | None = None
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Read the tensors of a safetensors file, in data order, and its metadata.

    The header is verified against `record`, the file's manifest entry, if that is given.

    Effects: not collective; any thread; blocks on reading the header from `files`, by default the local disk.

    Raises:
        DamagedError: if the file is missing or truncated, or its header fails the check or breaks the format.
        CheckpointError: if the disk fails.
    """
    try:
        with (files or LocalFiles(path.parent)).opened(path.name) as file:
            size_bytes = file.size_bytes()
            prefix = bytearray(min(_PREFIX_BYTES, size_bytes))
            file.fill(memoryview(prefix), 0, len(prefix))
            begin = _PREFIX_BYTES + int.from_bytes(prefix, "little")
            if len(prefix) < _PREFIX_BYTES or begin > size_bytes:
                raise ValueError(f"its header would end at byte {begin} of {size_bytes}")
            if begin > _PREFIX_BYTES + _HEADER_LIMIT_BYTES:
                raise ValueError(f"its header would have {begin:,} bytes, more than safetensors allows")
            text = bytearray(begin - _PREFIX_BYTES)
            file.fill(memoryview(text), _PREFIX_BYTES, begin)
        if record is not None:
            _check_digest(bytes(prefix + text), record, size_bytes)
        entries = json.loads(text.decode(), object_pairs_hook=_object)
        metadata: dict[str, str] = entries.pop("__metadata__", {})
        "".join((*metadata, *metadata.values(), *entries)).encode()  # raises unless all are valid Unicode text
        tensors = {name: _stored(name, entry, begin, size_bytes) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: is not a whole safetensors file: {error}") from error
    found = dict(sorted(tensors.items(), key=lambda item: item[1][2:]))
    end = begin
    for name, tensor in found.items():
        if tensor.start != end:
            raise DamagedError(f"{path}: the data of {name} begin at byte {tensor.start}, not at {end}")
        end = tensor.end
    if end != size_bytes:
        raise DamagedError(f"{path}: has {size_bytes} bytes, but its header lists {end}")
    return found, metadata


def _check_digest(header: bytes, record: FileRecord, size_bytes: int) -> None:
    if size_bytes != record.size_bytes:
        raise ValueError(f"it has {size_bytes} bytes, was written with {record.size_bytes}")
    # Rank 0 writes each header as a separate range.
    first = next(iter(record.ranges), None)
    if first is None or first.end != len(header) or first.digest != digest_of(header):
        raise ValueError("its header is not what was written; use another checkpoint")


def _stored(name: str, entry: Any, begin: int, size_bytes: int) -> StoredTensor:
    """Parse one header entry, which any program may have written. Raises `ValueError` if it breaks the format."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not given by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ValueError(f"{name} has the type {dtype!r}, which safetensors does not have")
    if not isinstance(shape, list) or not all(_is_count(length) and length < 1 << 63 for length in shape):
        raise ValueError(f"{name} has a shape with a length that is not a 64-bit number of at least 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name} has data_offsets that are not two numbers of at least 0")
    first, last = offsets
    num_items = 0 if 0 in shape else 1
    for length in shape:
        num_items *= length
        # Check in the loop: multiplying thousands of large numbers would take minutes.
        if num_items > size_bytes:
            raise ValueError(f"{name} has more elements than the file has bytes")
    if last - first != num_items * ITEM_BYTES[dtype]:
        raise ValueError(f"{name} has bytes {first} to {last}, which are not those of {dtype} of shape {shape[:8]}")
    return StoredTensor(dtype, tuple(shape), begin + first, begin + last)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it has a key twice")
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def plan_layout(
    tensors: Sequence[TensorSpec], aliases: Mapping[str, str], max_shard_size_bytes: int | None = None
) -> Layout:
    """Assign tensors to files and byte offsets. Equal arguments give equal layouts on every rank.

    Args:
        tensors: in module order; weights are assigned to files in this order.
        aliases: additional name of a tied tensor -> name under which it is stored. They are written to the metadata, as
            `safetensors.torch.save_model` does.
        max_shard_size_bytes: limit of the data in one file of weights; a larger tensor gets its own file. None writes
            one file.
    """
    model = [tensor for tensor in tensors if tensor.section == "model"]
    optimizer = [tensor for tensor in tensors if tensor.section == "optimizer"]
    parts = _split(model, max_shard_size_bytes)
    names = [
        "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number in range(1, len(parts) + 1)
    ]
    metadata = {**aliases, "format": "pt"}
    files = [_file(name, part, metadata) for name, part in zip(names, parts, strict=True)]
    index = None
    if len(parts) > 1:
        weight_map = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        index = {"metadata": {"total_size": sum(tensor.size_bytes for tensor in model)}, "weight_map": weight_map}
    if optimizer:
        files.append(_file("optimizer.safetensors", optimizer, {"format": "pt"}))
    places: dict[Key, tuple[int, int]] = {}
    for position, file in enumerate(files):
        offset = len(file.header)
        for tensor in file.tensors:
            places[tensor.key] = (position, offset)
            offset += tensor.size_bytes
    return Layout(tuple(files), places, index)


def _split(tensors: Sequence[TensorSpec], max_size_bytes: int | None) -> list[list[TensorSpec]]:
    parts: list[list[TensorSpec]] = [[]]
    used_bytes = 0
    for tensor in tensors:
        if max_size_bytes is not None and parts[-1] and used_bytes + tensor.size_bytes > max_size_bytes:
            parts.append([])
            used_bytes = 0
        parts[-1].append(tensor)
        used_bytes += tensor.size_bytes
    return parts


def _file(name: str, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> FileLayout:
    ordered = sorted(tensors, key=lambda tensor: (_ORDER[tensor.dtype], tensor.name.encode()))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in ordered:
        if tensor.name in entries:
            raise CheckpointError(f"{tensor.name}: is a name that the safetensors format reserves; rename the tensor")
        end = offset + tensor.size_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return FileLayout(name, header, len(header) + offset, tuple(ordered))
