"""What a checkpoint has, by the names of the model's parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from harness.checkpoint.commit import FileRecord, read_manifest
from harness.checkpoint.layout import StoredTensor, read_header
from harness.checkpoint.shards.source import DTYPES
from harness.errors import CheckpointError

_OPTIMIZER_FILE = "optimizer.safetensors"
MASTER = "master"


class Place(NamedTuple):
    """Where a tensor is: the file, and what its header says."""

    file: str
    tensor: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        """That it is stored as."""
        return DTYPES[self.tensor.dtype]


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint.

    Args:
        checkpoint: its directory.
        step: optimizer steps that were complete.
        records: file of tensors -> what the manifest says of it.
        model: name -> place, of parameters and buffers.
        aliases: name that was tied -> the name under which its tensor is stored.
        states: parameter -> kind -> place, of the optimizer's state; ``master`` is among the kinds.
        strange: tensors of the optimizer's file that belong to no parameter of the checkpoint.
    """

    checkpoint: Path
    step: int
    records: Mapping[str, FileRecord]
    model: Mapping[str, Place]
    aliases: Mapping[str, str]
    states: Mapping[str, Mapping[str, Place]]
    strange: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Path) -> Stored:
        """Read the manifest and the headers.

        Effects: not collective; any thread; blocks for reading; nothing on disk.

        Raises:
            CheckpointError: if one is missing, or not what was written.
        """
        manifest = read_manifest(checkpoint)
        records = {file.name: file for file in manifest.files if file.name.endswith(".safetensors")}
        model: dict[str, Place] = {}
        optimizer: dict[str, Place] = {}
        tied: dict[str, str] = {}
        for file, record in records.items():
            tensors, metadata = read_header(checkpoint / file, record)
            if (last := max((tensor.end for tensor in tensors.values()), default=0)) > record.size_bytes:
                raise CheckpointError(f"{checkpoint / file}: was written with {record.size_bytes} bytes, has {last}")
            places = {name: Place(file, tensor) for name, tensor in tensors.items()}
            if file == _OPTIMIZER_FILE:
                optimizer = places
            else:
                model |= places
                tied |= metadata
        aliases = {alias: name for alias, name in tied.items() if name in model and alias not in model}
        states: dict[str, dict[str, Place]] = {}
        strange = []
        for name, place in optimizer.items():
            kind, parameter = split_name(name, model)
            if parameter:
                states.setdefault(parameter, {})[kind] = place
            else:
                strange.append(name)
        return cls(checkpoint, manifest.step, records, model, aliases, states, tuple(strange))

    def name_of(self, name: str) -> str:
        """The name under which a tensor of the model is stored: what was tied may stand for itself now."""
        return self.aliases.get(name, name)

    def state_of(self, parameter: str) -> Mapping[str, Place]:
        """Kind -> place of what the optimizer had for a parameter, its master left out."""
        kinds = self.states.get(self.name_of(parameter), {})
        return {kind: place for kind, place in kinds.items() if kind != MASTER}

    @property
    def has_state(self) -> bool:
        """Whether the optimizer had a state for any parameter."""
        return any(kinds.keys() != {MASTER} for kinds in self.states.values())

    def weight(self, name: str, dtype: torch.dtype | None) -> Place | None:
        """Where a weight, or a buffer, that is held as `dtype` is: the most precise values there are."""
        name = self.name_of(name)
        place, master = self.model.get(name), self.states.get(name, {}).get(MASTER)
        return master if place is not None and master is not None and place.dtype != dtype else place

    def master(self, parameter: str) -> Place | None:
        """Where the fp32 master of a weight is: a weight without one is its own."""
        name = self.name_of(parameter)
        return self.states.get(name, {}).get(MASTER) or self.model.get(name)


def split_name(name: str, parameters: Collection[str]) -> tuple[str, str]:
    """Kind and parameter of ``<kind>.<parameter>``; no parameter if it is none of the given ones."""
    kind, _, parameter = name.partition(".")
    while parameter and parameter not in parameters:
        more, _, parameter = parameter.partition(".")
        kind = f"{kind}.{more}"
    return (kind, parameter) if parameter else (name, "")
