"""The commit: a directory with a manifest is a checkpoint, one without is none.

Everything is written into a temporary directory beside the final one; the manifest comes last, then
one rename makes it visible. Importing this never imports torch: `harness checkpoints` reads with it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harness.durable import replace_file, sync_directory
from harness.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "harness-checkpoint"
VERSION = 1
_TEMPORARY_PREFIX = ".tmp-"


class Range(NamedTuple):
    """Bytes `start` to `end` of a file: the rank that wrote them, and their XXH3-128 digest in hex."""

    start: int
    end: int
    rank: int
    digest: str


@dataclass(frozen=True)
class FileRecord:
    """One file: its size, and the digest of each range of its bytes.

    Args:
        name: file name in the checkpoint's directory.
        size_bytes: length of the file.
        ranges: in order, together the whole file.
    """

    name: str
    size_bytes: int
    ranges: tuple[Range, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, as ``manifest.json`` says it.

    Args:
        key: unique name of this checkpoint anywhere; MLflow's model carries it as a tag.
        epoch: epochs that were complete.
        step: optimizer steps that were complete.
        time_ms: when it was committed, in milliseconds since the epoch.
        metrics: the reduced metrics of that moment.
        files: what is in it.
        topology: strategy, world size and the like of the ranks that wrote it.
        versions: package -> version.
        save: how it was saved: seconds of each stage, snapshot mode, transport.
    """

    key: str
    epoch: int
    step: int
    time_ms: int
    metrics: Mapping[str, float]
    files: tuple[FileRecord, ...]
    topology: Mapping[str, Any]
    versions: Mapping[str, str]
    save: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Names of the files that hold the weights, with their index where there is one."""
        return tuple(file.name for file in self.files if file.name.startswith("model"))


def temporary_of(final: Path, attempt: str) -> Path:
    """The directory in which the checkpoint `final` is written; `attempt` makes it nobody else's.

    A writer that an earlier job has left behind writes into that job's directory, not into this one.
    """
    return final.with_name(f"{_TEMPORARY_PREFIX}{final.name}-{attempt}")


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and make the checkpoint visible under its final name.

    Effects: not collective; any thread; blocks until the disk has it; leaves `final`, complete.

    Raises:
        CheckpointError: if there is a checkpoint of that name already.
    """
    if final.exists():
        raise CheckpointError(f"{final}: there is a checkpoint of that name already")
    replace_file(temporary / MANIFEST, json.dumps({"format": FORMAT, "version": VERSION, **asdict(manifest)}, indent=1))
    os.rename(temporary, final)
    sync_directory(final.parent)


def discard(temporary: Path) -> None:
    """Remove what an unfinished save has left, as far as that is possible."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Remove what saves that were cut off have left."""
    for path in checkpoints_dir.glob(f"{_TEMPORARY_PREFIX}*"):
        discard(path)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of one checkpoint directory.

    Raises:
        CheckpointError: if there is none, it is damaged, or of a format that this version cannot read.
    """
    path = checkpoint / MANIFEST
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST}, so it is not a whole checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is not the manifest of a {FORMAT}")
    if record.get("version") != VERSION:
        raise CheckpointError(f"{path}: has version {record.get('version')}, this harness reads {VERSION}; update it")
    try:
        return Manifest(
            key=record["key"],
            epoch=record["epoch"],
            step=record["step"],
            time_ms=record["time_ms"],
            metrics=record["metrics"],
            files=tuple(
                FileRecord(f["name"], f["size_bytes"], tuple(Range(*part) for part in f["ranges"]))
                for f in record["files"]
            ),
            topology=record["topology"],
            versions=record["versions"],
            save=record.get("save", {}),
        )
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path}: is damaged: {error!r}") from error


def list_checkpoints(checkpoints_dir: Path) -> Sequence[tuple[str, Manifest]]:
    """Name and manifest of each committed checkpoint, oldest first."""
    found = [
        (path.name, read_manifest(path))
        for path in checkpoints_dir.glob("*")
        if not path.name.startswith(_TEMPORARY_PREFIX) and (path / MANIFEST).exists()
    ]
    return sorted(found, key=lambda item: (item[1].step, item[1].time_ms))
