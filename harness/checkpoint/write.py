"""Gathered tensors to safetensors files, each on the disk itself before this returns."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import save_file
from torch import Tensor

from harness.checkpoint.commit import FileRecord
from harness.checkpoint.gather import GatheredState
from harness.checkpoint.layout import FilePlan, plan_files

_CHUNK_BYTES = 4 << 20


def write_state(
    directory: Path, state: GatheredState, trainer_state: Mapping[str, Any] | None, max_shard_size_bytes: int | None
) -> tuple[FileRecord, ...]:
    """Write model, optimizer and trainer state into an existing directory.

    Effects: not collective; any thread; blocks until the disk has all of it; leaves the files.

    Args:
        directory: where to; nothing else writes there.
        state: what to write; without optimizer tensors there is no ``optimizer.safetensors``.
        trainer_state: JSON values for ``trainer_state.json``, or None for weights alone.
        max_shard_size_bytes: limit of one file of weights, or None.

    Raises:
        OSError: if the disk refuses.
        SafetensorError: likewise, where it is a file of tensors.
    """
    sizes = {name: tensor.nbytes for name, tensor in state.model.items()}
    plans = plan_files(sizes, "model", max_shard_size_bytes)
    # The same convention as safetensors.torch.save_model: a tied name maps to the one that is stored.
    metadata = {**state.aliases, "format": "pt"}
    records = [_write_tensors(directory, plan, state.model, metadata) for plan in plans]
    if len(plans) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: plan.name for plan in plans for name in plan.tensors},
        }
        records.append(_write_json(directory / "model.safetensors.index.json", index))
    if state.optimizer:
        plan = FilePlan("optimizer.safetensors", tuple(state.optimizer))
        records.append(_write_tensors(directory, plan, state.optimizer, {"format": "pt"}))
    if trainer_state is not None:
        records.append(_write_json(directory / "trainer_state.json", trainer_state))
    return tuple(records)


def _write_tensors(
    directory: Path, plan: FilePlan, tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> FileRecord:
    path = directory / plan.name
    save_file({name: tensors[name] for name in plan.tensors}, path, metadata)
    return _sync_and_describe(path)


def _write_json(path: Path, values: Mapping[str, Any]) -> FileRecord:
    path.write_text(json.dumps(values, indent=1) + "\n")
    return _sync_and_describe(path)


def _sync_and_describe(path: Path) -> FileRecord:
    digest = xxhash.xxh3_128()
    size_bytes = 0
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return FileRecord(path.name, size_bytes, ((0, size_bytes, digest.hexdigest()),))
