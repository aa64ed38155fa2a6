"""Save and load the tensors that ``trainer_state.json`` refers to, in ``states.safetensors``.

    save      encode(value, kept.put)  ->  copies on the main thread  ->  write, on rank 0
    resume    read                     ->  decode(value, get)

These tensors belong to no parameter: an optimizer's state under string keys, or tensors in its groups. They are usually
small. Rank 0 writes its own; the plan of a save checks that all ranks have equal ones. Without any, no file is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.checkpoint.format.commit import STATES, FileRecord, Manifest
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.files import Files, LocalFiles
from harness.checkpoint.format.json_values import Get, UnsavableTensor
from harness.checkpoint.format.ranges import Range, Ranges
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES

_PREFIX_BYTES = 8


class KeptTensors:
    """Collect copies of the tensors of one save. `tensors` maps names to copies on the host."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def hash_with(self, record: Any) -> int:
        """Return a 63-bit hash of JSON values and the tensors, the same in every process."""
        digest = xxhash.xxh3_64(json.dumps(record, sort_keys=True).encode())
        for tensor in self.tensors.values():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.intdigest() >> 1

    def put(self, value: Tensor) -> Any:
        """Copy a tensor to the host and return a JSON reference to it.

        Effects: not collective; main thread; synchronizes with CUDA for a CUDA tensor.

        Raises:
            TypeError: as `require_savable`.
        """
        require_savable(value)
        name = str(len(self.tensors))
        copied = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self.tensors[name] = copied
        return [name, value.device.type != "cpu"]


def require_savable(value: Tensor) -> None:
    """Check that `KeptTensors.put` can store a tensor.

    Raises:
        UnsavableTensor: if the tensor is sparse, sharded or a wrapper of others, or safetensors lacks its type.
        TypeError: if it is a parameter, which is saved elsewhere.
    """
    if isinstance(value, nn.Parameter):
        raise TypeError("a parameter of a model")
    part: Any = value
    if is_traceable_wrapper_subclass(part):  # a DTensor, for example
        raise UnsavableTensor(f"a {type(value).__name__}, a tensor that is sharded or made of others")
    if value.layout is not torch.strided:
        raise UnsavableTensor(f"a sparse tensor ({value.layout})")
    if value.dtype not in DTYPE_NAMES:
        raise UnsavableTensor(f"a tensor of {value.dtype}, for which safetensors has no type")


def tensor_getter(tensors: Mapping[str, Tensor], device: torch.device) -> Get:
    """Return the `get` of `decode`. It moves the tensors that were on an accelerator to `device`."""

    def get(content: Any) -> Tensor:
        name, is_on_device = content
        if not isinstance(is_on_device, bool):
            raise TypeError(content)
        return tensors[name].to(device) if is_on_device else tensors[name]

    return get


def write(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write the tensors to `path` as safetensors.

    Effects: not collective; any thread, on rank 0; blocks on fsync.

    Raises:
        OSError: if the disk fails.
    """
    data = safetensors.torch.save(dict(tensors), {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    # The header is a separate range, as in the other files of tensors.
    begin = _PREFIX_BYTES + int.from_bytes(data[:_PREFIX_BYTES], "little")
    borders = [0, begin, len(data)] if begin < len(data) else [0, begin]
    ranges = Ranges.of(Range(start, end, 0, digest_of(memoryview(data)[start:end])) for start, end in pairwise(borders))
    return FileRecord(path.name, len(data), ranges)


def read(checkpoint: Path, manifest: Manifest, files: Files | None = None) -> dict[str, Tensor]:
    """Read the tensors to the host; empty if the checkpoint has no such file.

    Effects: not collective; any thread; blocks on reading one file.

    Raises:
        ValueError: if the file's size, digests or format are wrong.
        CheckpointError: if the file is missing or the disk fails.
    """
    record = next((file for file in manifest.files if file.name == STATES), None)
    if record is None:
        return {}
    try:
        return safetensors.torch.load(content_of(files or LocalFiles(checkpoint), record))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{STATES} is not a safetensors file: {error}") from error


def content_of(files: Files, record: FileRecord) -> bytes:
    """Read all bytes of a file and verify their digests.

    Raises:
        ValueError: if the size or a digest is wrong.
        CheckpointError: if the file is missing or the disk fails.
    """
    with files.opened(record.name) as file:
        if (size_bytes := file.size_bytes()) != record.size_bytes:
            raise ValueError(f"{record.name} has {size_bytes} bytes, was written with {record.size_bytes}")
        data = bytearray(size_bytes)
        file.fill(memoryview(data), 0, size_bytes)
    if any(digest_of(memoryview(data)[part.start : part.end]) != part.digest for part in record.ranges):
        raise ValueError(f"{record.name} is not what was written")
    return bytes(data)
