"""Which tensor goes into which file, from names and sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file: its name, and the tensors in it, in order."""

    name: str
    tensors: tuple[str, ...]


def plan_files(sizes_bytes: Mapping[str, int], stem: str, max_shard_size_bytes: int | None) -> tuple[FilePlan, ...]:
    """Divide tensors among files of at most a given size, keeping their order.

    Args:
        sizes_bytes: tensor name -> bytes of its data.
        stem: ``model`` gives ``model.safetensors``, or ``model-00001-of-00002.safetensors`` and so on.
        max_shard_size_bytes: limit of a file's tensor data; a tensor that is larger gets a file of its
            own. None: one file.
    """
    files: list[list[str]] = [[]]
    used_bytes = 0
    for name, size_bytes in sizes_bytes.items():
        if max_shard_size_bytes is not None and files[-1] and used_bytes + size_bytes > max_shard_size_bytes:
            files.append([])
            used_bytes = 0
        files[-1].append(name)
        used_bytes += size_bytes
    if len(files) == 1:
        return (FilePlan(f"{stem}.safetensors", tuple(files[0])),)
    count = len(files)
    return tuple(
        FilePlan(f"{stem}-{index:05d}-of-{count:05d}.safetensors", tuple(names))
        for index, names in enumerate(files, start=1)
    )
