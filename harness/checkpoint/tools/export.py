"""A checkpoint's weights as plain safetensors elsewhere: other file sizes, another type, in a stream."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import uuid
from pathlib import Path

import torch

from harness.checkpoint.format.commit import read_manifest
from harness.checkpoint.format.layout import FileLayout, StoredTensor, TensorSpec, plan_layout, read_header
from harness.checkpoint.format.tensor_shard import DTYPE_NAMES, DTYPES
from harness.checkpoint.format.verify import require_whole
from harness.errors import CheckpointError
from harness.io.durable_files import sync_directory

_CHUNK_ITEMS = 4 << 20


def export(checkpoint: Path, output: Path, *, dtype: str | None = None, max_shard_size_bytes: int | None = None) -> int:
    """Write the weights of a checkpoint into a new directory, after verifying them.

    Effects: not collective; any thread; blocks until the disk has everything; at most 4 Mi elements in
    memory at a time; leaves `output`, complete or not at all.

    Args:
        checkpoint: its directory.
        output: to be made; must not exist.
        dtype: floating-point tensors are cast to it (``float32``, ``bfloat16``, ``float16``); None: as
            they are.
        max_shard_size_bytes: limit of one file, or None for a single file.

    Returns:
        Bytes written.

    Raises:
        CheckpointError: if the checkpoint is damaged, or `output` exists or cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already; give a directory that does not")
    require_whole(checkpoint, weights_only=True)
    stored: dict[str, tuple[Path, StoredTensor]] = {}
    aliases: dict[str, str] = {}
    manifest = read_manifest(checkpoint)
    for record in manifest.files:
        if record.name in manifest.weight_files and record.name.endswith(".safetensors"):
            tensors, metadata = read_header(checkpoint / record.name, record)
            stored |= {tensor: (checkpoint / record.name, place) for tensor, place in tensors.items()}
            aliases |= metadata
    aliases = {alias: first for alias, first in aliases.items() if first in stored}
    target = None if dtype is None else getattr(torch, dtype)
    specs = [
        TensorSpec("model", name, _written_as(place.dtype, target), place.shape) for name, (_, place) in stored.items()
    ]
    layout = plan_layout(specs, aliases, max_shard_size_bytes)
    temporary = output.with_name(f".tmp-{output.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        for file in layout.files:
            _write(temporary / file.name, file, stored)
        if layout.index is not None:
            (temporary / "model.safetensors.index.json").write_text(json.dumps(layout.index, indent=1) + "\n")
        sync_directory(temporary)
        os.rename(temporary, output)
        sync_directory(output.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"{output}: {error.strerror}; free space there or give another --output") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return layout.size_bytes


def _written_as(dtype: str, target: torch.dtype | None) -> str:
    # fp8 as well: it is of no use without the scales that its own format brings.
    return dtype if target is None or not DTYPES[dtype].is_floating_point else DTYPE_NAMES[target]


def _write(path: Path, file: FileLayout, stored: dict[str, tuple[Path, StoredTensor]]) -> None:
    with path.open("wb") as output:
        output.write(file.header)
        for spec in file.tensors:
            source, place = stored[spec.name]
            if not spec.num_items:
                continue
            with source.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as data:
                item = (place.end - place.start) // spec.num_items
                for first in range(0, spec.num_items, _CHUNK_ITEMS):
                    last = min(first + _CHUNK_ITEMS, spec.num_items)
                    # Copied out of the map: its pages go when they are needed elsewhere.
                    part = bytearray(data[place.start + first * item : place.start + last * item])
                    if spec.dtype != place.dtype:
                        cast = torch.frombuffer(part, dtype=DTYPES[place.dtype]).to(DTYPES[spec.dtype])
                        part = bytearray(cast.view(torch.uint8).numpy().tobytes())
                    output.write(part)
        output.flush()
        os.fsync(output.fileno())
