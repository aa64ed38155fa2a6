"""The tensors of a checkpoint, by the names of the model's parameters."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from harness.checkpoint.format.commit import MANIFEST, STATES, FileRecord, Manifest, read_manifest
from harness.checkpoint.format.files import Files, read_file
from harness.checkpoint.format.layout import StoredTensor, read_header
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.format.tensor_shard import DTYPES
from harness.errors import CheckpointError, DamagedError

_OPTIMIZER_FILE = "optimizer.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
MASTER = "master"


class StoredPlace(NamedTuple):
    """The place of a tensor: the file, and the entry in its header."""

    file: str
    tensor: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        """The type in which it is stored."""
        return DTYPES[self.tensor.dtype]


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint.

    Args:
        checkpoint: its directory.
        step: completed optimizer steps.
        records: file of tensors -> its entry in the manifest.
        model: name -> place, of parameters and buffers.
        aliases: name of a tied tensor -> the name under which it is stored.
        states: parameter -> kind -> place, of the optimizer's state; ``master`` is one of the kinds.
        strange: tensors of the optimizer's file that belong to no parameter of the checkpoint.
    """

    checkpoint: Path
    step: int
    records: Mapping[str, FileRecord]
    model: Mapping[str, StoredPlace]
    aliases: Mapping[str, str]
    states: Mapping[str, Mapping[str, StoredPlace]]
    strange: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Path, manifest: Manifest | None = None, files: Files | None = None) -> CheckpointIndex:
        """Read the headers, and the manifest if it is not given.

        Effects: not collective; any thread; blocks for reading; nothing on disk.

        Args:
            checkpoint: its directory.
            manifest: the checkpoint's.
            files: source of the bytes; None: this node's disk.

        Raises:
            DamagedError: if a file is missing, or not what was written.
            CheckpointError: if the disk fails.
        """
        manifest = manifest or read_manifest(checkpoint)
        tensors = [file for file in manifest.files if file.name.endswith(".safetensors") and file.name != STATES]
        records = {file.name: file for file in tensors}
        return cls._of(checkpoint, manifest.step, records, files)

    @classmethod
    def of_weights(
        cls, directory: Path, records: Sequence[FileRecord] | None = None, files: Files | None = None
    ) -> CheckpointIndex:
        """Read the headers of the weights only, in a checkpoint or in a directory in Hugging Face's layout.

        Effects: as `of`.

        Args:
            directory: of the weights.
            records: its `weight_records`, if they are already known.
            files: source of the bytes; None: this node's disk.

        Raises:
            CheckpointError: if there are no weights, or they are not what was written.
        """
        found = weight_records(directory) if records is None else records
        return cls._of(directory, 0, {file.name: file for file in found}, files)

    @classmethod
    def _of(
        cls, checkpoint: Path, step: int, records: Mapping[str, FileRecord], files: Files | None
    ) -> CheckpointIndex:
        model: dict[str, StoredPlace] = {}
        optimizer: dict[str, StoredPlace] = {}
        tied: dict[str, str] = {}
        for file, record in records.items():
            tensors, metadata = read_header(checkpoint / file, record if record.ranges else None, files)
            if (last := max((tensor.end for tensor in tensors.values()), default=0)) > record.size_bytes:
                raise DamagedError(f"{checkpoint / file}: was written with {record.size_bytes} bytes, has {last}")
            places = {name: StoredPlace(file, tensor) for name, tensor in tensors.items()}
            if file == _OPTIMIZER_FILE:
                optimizer = places
            else:
                model |= places
                tied |= metadata
        aliases = {alias: name for alias, name in tied.items() if name in model and alias not in model}
        states: dict[str, dict[str, StoredPlace]] = {}
        strange = []
        for name, place in optimizer.items():
            kind, parameter = split_name(name, model)
            if parameter:
                states.setdefault(parameter, {})[kind] = place
            else:
                strange.append(name)
        return cls(checkpoint, step, records, model, aliases, states, tuple(strange))

    def name_of(self, name: str) -> str:
        """The name under which a tensor of the model is stored; a tied one may have been untied since."""
        return self.aliases.get(name, name)

    def state_of(self, parameter: str) -> Mapping[str, StoredPlace]:
        """Kind -> place of the optimizer's state of a parameter, without its master."""
        kinds = self.states.get(self.name_of(parameter), {})
        return {kind: place for kind, place in kinds.items() if kind != MASTER}

    @property
    def has_state(self) -> bool:
        """Whether the optimizer had state of any parameter."""
        return any(kinds.keys() != {MASTER} for kinds in self.states.values())

    def weight(self, name: str, dtype: torch.dtype | None) -> StoredPlace | None:
        """The place of the most precise values of a weight or buffer that has the type `dtype` in the model."""
        name = self.name_of(name)
        place, master = self.model.get(name), self.states.get(name, {}).get(MASTER)
        return master if place is not None and master is not None and place.dtype != dtype else place

    def master(self, parameter: str) -> StoredPlace | None:
        """The place of the fp32 master of a weight; a weight without one is its own master."""
        name = self.name_of(parameter)
        return self.states.get(name, {}).get(MASTER) or self.model.get(name)


def weight_records(directory: Path) -> tuple[FileRecord, ...]:
    """The files of weights in a checkpoint, or in a directory in Hugging Face's layout.

    Effects: not collective; any thread; blocks for reading the manifest or the index; nothing on disk.

    Raises:
        CheckpointError: if there are none, or the index is damaged.
    """
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        weights = [name for name in manifest.weight_files if name.endswith(".safetensors")]
        return tuple(file for file in manifest.files if file.name in weights)
    try:
        # There are no digests.
        names = _weight_files(directory)
        return tuple(FileRecord(name, (directory / name).stat().st_size, Ranges()) for name in names)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; give a directory with safetensors") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / _INDEX_FILE}: cannot be read: {error}; use another directory") from error


def _weight_files(directory: Path) -> list[str]:
    """The files in the index, or the only file, as in `transformers`."""
    if (directory / _INDEX_FILE).exists():
        index = json.loads(read_file(directory / _INDEX_FILE))
        names = sorted(set(index["weight_map"].values()))
        if not all(name == Path(name).name for name in names):
            raise ValueError("it lists files in other directories")
        return names
    found = sorted(path.name for path in directory.glob("*.safetensors"))
    if "model.safetensors" in found:
        return ["model.safetensors"]
    if len(found) != 1:
        raise CheckpointError(
            f"{directory}: has {len(found)} safetensors files, and neither {_INDEX_FILE} nor model.safetensors; give "
            "the directory that `save_pretrained` or a checkpoint has written"
        )
    return found


def split_name(name: str, parameters: Collection[str]) -> tuple[str, str]:
    """Kind and parameter of ``<kind>.<parameter>``; an empty parameter if it is not among the given ones."""
    kind, _, parameter = name.partition(".")
    while parameter and parameter not in parameters:
        more, _, parameter = parameter.partition(".")
        kind = f"{kind}.{more}"
    return (kind, parameter) if parameter else (name, "")
