"""Index the tensors of a checkpoint by the names of the model's parameters."""

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
    """Locate a stored tensor by its file and its header entry."""

    file: str
    tensor: StoredTensor

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored type."""
        return DTYPES[self.tensor.dtype]


@dataclass(frozen=True)
class CheckpointIndex:
    """Map the names of a checkpoint's tensors to their places.

    Args:
        checkpoint: directory of the files.
        step: completed optimizer steps.
        records: safetensors file -> manifest entry.
        model: parameter or buffer -> place.
        aliases: additional name of a tied tensor -> name under which it is stored.
        states: parameter -> kind -> place of the optimizer's state; the kind ``master`` is the fp32 master weight.
        strange: tensors in the optimizer's file that belong to no parameter of the checkpoint.
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
        """Read the headers of a checkpoint's tensors, and the manifest if it is not given.

        Effects: not collective; any thread; blocks on reading `files`, by default the local disk.

        Raises:
            DamagedError: if a file is missing or fails its check.
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

        Effects: as `of`. `records` avoids a call of `weight_records`.

        Raises:
            CheckpointError: if there are no weights, a file fails its check, or the disk fails.
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
        """Return the name under which a tensor is stored; a tensor that was tied then need not be tied now."""
        return self.aliases.get(name, name)

    def state_of(self, parameter: str) -> Mapping[str, StoredPlace]:
        """Map kind to place of the optimizer's state of a parameter, without its master."""
        kinds = self.states.get(self.name_of(parameter), {})
        return {kind: place for kind, place in kinds.items() if kind != MASTER}

    @property
    def has_state(self) -> bool:
        """Return whether the checkpoint has optimizer state, other than masters, of any parameter."""
        return any(kinds.keys() != {MASTER} for kinds in self.states.values())

    def weight(self, name: str, dtype: torch.dtype | None) -> StoredPlace | None:
        """Return the place of the most precise values: the master, if any, when the stored type is not `dtype`."""
        name = self.name_of(name)
        place, master = self.model.get(name), self.states.get(name, {}).get(MASTER)
        return master if place is not None and master is not None and place.dtype != dtype else place

    def master(self, parameter: str) -> StoredPlace | None:
        """Return the place of the fp32 master of a weight, or of the weight itself if it has no master."""
        name = self.name_of(parameter)
        return self.states.get(name, {}).get(MASTER) or self.model.get(name)


def weight_records(directory: Path) -> tuple[FileRecord, ...]:
    """List the files of weights in a checkpoint, or in a directory in Hugging Face's layout, which has no digests.

    Effects: not collective; any thread; blocks on reading the manifest or the index.

    Raises:
        CheckpointError: if there are none, or the manifest or index cannot be read.
    """
    if (directory / MANIFEST).exists():
        manifest = read_manifest(directory)
        weights = [name for name in manifest.weight_files if name.endswith(".safetensors")]
        return tuple(file for file in manifest.files if file.name in weights)
    try:
        names = _weight_files(directory)
        return tuple(FileRecord(name, (directory / name).stat().st_size, Ranges()) for name in names)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; give a directory with safetensors") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{directory / _INDEX_FILE}: cannot be read: {error}; use another directory") from error


def _weight_files(directory: Path) -> list[str]:
    """List the files in the index, else ``model.safetensors``, else the only file, as `transformers` does."""
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
    """Split ``<kind>.<parameter>``. The parameter is empty if it is not one of `parameters`."""
    kind, _, parameter = name.partition(".")
    while parameter and parameter not in parameters:
        more, _, parameter = parameter.partition(".")
        kind = f"{kind}.{more}"
    return (kind, parameter) if parameter else (name, "")
