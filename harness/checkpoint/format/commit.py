"""Write, read and list manifests. A directory is a checkpoint if, and only if, it has a manifest.

All files are written to a temporary directory next to the final one, the manifest last. One rename makes the checkpoint
visible. This module never imports torch: `harness checkpoints` reads manifests with it.

The last field of a manifest is the XXH3-128 of all bytes before it, so the bytes are verified before they are parsed.
The digests in the manifest cover every other file.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from harness.checkpoint.format.files import read_error, read_file
from harness.checkpoint.format.ranges import Ranges
from harness.errors import CheckpointError, DamagedError
from harness.io.durable_files import replace_file, sync_directory

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
STATES = "states.safetensors"
FORMAT = "harness-checkpoint"
# 1: a range's digest is its XXH3-128. 2: see `digest`; the manifest's checksum is that of its canonical JSON.
VERSION = 3
_READABLE = (2, VERSION)
_NUM_REMOVALS = 10
TEMPORARY_PREFIX = ".tmp-"
DAMAGED_PREFIX = "damaged-"
_FIELD_TYPES = {
    "key": str,
    "epoch": int,
    "step": int,
    "time_ms": int,
    "metrics": dict,
    "topology": dict,
    "versions": dict,
    "save": dict,
}
# Errors that parsing raises if the bytes are not a manifest.
_PARSE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, zlib.error)


@dataclass(frozen=True)
class FileRecord:
    """Record one file of a checkpoint. `ranges` are in order and cover the whole file."""

    name: str
    size_bytes: int
    ranges: Ranges


@dataclass(frozen=True)
class Manifest:
    """Hold the content of ``manifest.json``.

    Args:
        key: globally unique name of the checkpoint, and a tag of its MLflow model.
        epoch: completed epochs.
        step: completed optimizer steps.
        time_ms: time of the commit, in milliseconds since 1970.
        metrics: latest reduced metrics.
        files: all other files of the checkpoint.
        topology: strategy, world size and devices of the ranks that saved.
        versions: package -> version.
        save: transport, snapshot mode and seconds of each stage of the save.
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
        """Return the total bytes of all files but the manifest."""
        return sum(file.size_bytes for file in self.files)

    @property
    def weight_files(self) -> tuple[str, ...]:
        """Return the names of the files of weights, and of their index if there is one."""
        return tuple(file.name for file in self.files if file.name.startswith("model"))

    @property
    def can_be_resumed(self) -> bool:
        """Return whether training can be resumed: false for a checkpoint of weights only."""
        return any(file.name == TRAINER_STATE for file in self.files)


def temporary_of(final: Path, attempt: str) -> Path:
    """Return the directory in which one attempt of a job writes the checkpoint `final`.

    Each attempt has its own, because a writer process of an earlier attempt may still be running.
    """
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{attempt}")


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and make the checkpoint visible under its final name.

    Effects: not collective; any thread; blocks on fsync; renames `temporary` to `final`.

    Raises:
        CheckpointError: if `final` exists, or the manifest cannot be written as JSON.
    """
    if final.exists():
        raise CheckpointError(f"{final}: a checkpoint of this name already exists; remove it, or choose another name")
    try:
        text = manifest_text(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{final}: its manifest cannot be written: {error}") from error
    replace_file(temporary / MANIFEST, text)
    os.rename(temporary, final)
    sync_directory(final.parent)


def discard(temporary: Path) -> None:
    """Remove the directory of an unfinished save. Disk errors are ignored."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Remove the directories of interrupted saves.

    Effects: not collective; any thread; retries for about a second, because the writer process of a killed rank may
    still create files while it finishes its request.
    """
    for _ in range(_NUM_REMOVALS):
        leftovers = list(checkpoints_dir.glob(f"{TEMPORARY_PREFIX}*"))
        if not leftovers:
            return
        for path in leftovers:
            discard(path)
        time.sleep(0.1)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that its name is free, and return its new path.

    Effects: not collective; any thread; blocks on fsync; removes nothing. `scan_checkpoints` skips the new name.

    Raises:
        OSError: if the disk fails.
    """
    aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    os.rename(checkpoint, aside)
    sync_directory(checkpoint.parent)
    return aside


def names_set_aside(checkpoints_dir: Path) -> list[str]:
    """List the directories that `set_aside` has renamed."""
    return sorted(path.name for path in checkpoints_dir.glob(f"{DAMAGED_PREFIX}*"))


def manifest_text(manifest: Manifest) -> str:
    """Serialize a manifest, with its checksum.

    Raises:
        TypeError: if a value is not JSON.
        ValueError: if a number is not finite.
    """
    values = {name: getattr(manifest, name) for name in _FIELD_TYPES}
    files = [
        {"name": file.name, "size_bytes": file.size_bytes, "ranges": file.ranges.to_json()} for file in manifest.files
    ]
    return sealed({"format": FORMAT, "version": VERSION, **values, "files": files})


def sealed(record: Mapping[str, Any]) -> str:
    """Serialize a JSON object, one line for each key, with a checksum of these bytes in its last line."""
    lines = (f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in record.items())
    content = "{\n" + ",\n".join(lines)
    return content + _seal(content.encode()).decode()


def _seal(content: bytes) -> bytes:
    return b',\n "checksum": "%s"\n}\n' % xxhash.xxh3_128_hexdigest(content).encode()


_SEAL_BYTES = len(_seal(b""))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of a checkpoint directory.

    Effects: not collective; any thread; blocks on reading one file.

    Raises:
        DamagedError: if there is no manifest, or its checksum or content is wrong.
        CheckpointError: if another version of harness wrote it, or the disk fails.
    """
    path = checkpoint / MANIFEST
    try:
        record = _verified(read_file(path))
        if record["format"] != FORMAT:
            raise ValueError(f"it is not the manifest of a {FORMAT}")
        version = record["version"]
        if type(version) is not int:
            raise ValueError(f"version is {version!r}")
        if version in _READABLE:
            return _parsed(record)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _NoManifest(f"{checkpoint}: has no {MANIFEST}, so it is not a whole checkpoint") from error
    except OSError as error:
        raise read_error(path, error) from error
    except _PARSE_ERRORS as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DamagedError(f"{path}: is damaged: {reason}; use another checkpoint") from error
    # Not a DamagedError: a resume skips damaged checkpoints, and would repeat training done with another version.
    remedy = "update harness" if version > VERSION else "use the harness that wrote it"
    raise CheckpointError(
        f"{path}: has format version {version}, this harness reads {_READABLE[0]} to {VERSION}; {remedy}, or choose "
        "another run_name"
    )


def _verified(data: bytes) -> dict[str, Any]:
    """Verify the checksum of a manifest and parse it. Raises one of `_PARSE_ERRORS` if the checksum is wrong."""
    content = data[:-_SEAL_BYTES]
    record: dict[str, Any]
    if data == content + _seal(content):
        record = json.loads(data)
        return record
    record = json.loads(data)
    rest = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    checksum = xxhash.xxh3_128_hexdigest(text.encode())
    if record["checksum"] != checksum or record["version"] not in (1, 2):
        raise ValueError("its checksum does not match its content")
    return record


class _NoManifest(DamagedError):
    """A directory has no manifest, so it is not a checkpoint; `scan_checkpoints` does not report it."""


class Scan(NamedTuple):
    """List the checkpoints in a directory.

    Args:
        good: (name, manifest) of each readable checkpoint, by step, then by time.
        bad: (name, reason) of each checkpoint whose manifest cannot be used, by name.
    """

    good: Sequence[tuple[str, Manifest]]
    bad: Sequence[tuple[str, str]]


def scan_checkpoints(checkpoints_dir: Path, read: Callable[[Path], Manifest] = read_manifest) -> Scan:
    """Find the checkpoints of a run. Temporary directories and those that were set aside are skipped.

    Effects: not collective; any thread; blocks on reading every manifest with `read`.

    Raises:
        CheckpointError: if the directory itself cannot be read.
    """
    good: list[tuple[str, Manifest]] = []
    bad: list[tuple[str, str]] = []
    try:
        names = sorted(os.listdir(checkpoints_dir))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise CheckpointError(f"{checkpoints_dir}: cannot be read: {error.strerror}") from error
    for name in names:
        if name.startswith((TEMPORARY_PREFIX, DAMAGED_PREFIX)):
            continue
        try:
            good.append((name, read(checkpoints_dir / name)))
        except _NoManifest:
            continue
        except CheckpointError as error:
            bad.append((name, str(error)))
    return Scan(sorted(good, key=lambda item: (item[1].step, item[1].time_ms)), bad)


def list_checkpoints(checkpoints_dir: Path) -> Sequence[tuple[str, Manifest]]:
    """Return the name and manifest of each readable checkpoint, oldest first."""
    return scan_checkpoints(checkpoints_dir).good


def _parsed(record: dict[str, Any]) -> Manifest:
    """Convert a verified object. Raises one of `_PARSE_ERRORS` if it does not follow the format."""
    read_ranges = Ranges.from_version_2 if record["version"] == 2 else Ranges.from_json
    values = {name: record[name] for name in _FIELD_TYPES}
    for name, kind in _FIELD_TYPES.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            raise ValueError(f"{name} is {values[name]!r}")
    files = tuple(FileRecord(file["name"], file["size_bytes"], read_ranges(file["ranges"])) for file in record["files"])
    for file in files:
        # The name is joined to the directory's path and must not escape it.
        if file.name in ("", ".", "..", MANIFEST) or set(file.name) & set("/\\\0"):
            raise ValueError(f"{file.name!r} is not the name of a file in the directory")
        if type(file.size_bytes) is not int or file.ranges.size_bytes != file.size_bytes:
            raise ValueError(f"{file.name}: its ranges end at byte {file.ranges.size_bytes}, not {file.size_bytes}")
    if len({file.name for file in files}) != len(files):
        raise ValueError("a file is listed twice")
    return Manifest(**values, files=files)
