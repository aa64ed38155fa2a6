"""The commit: a directory with a manifest is a checkpoint, one without is none.

Everything is written into a temporary directory beside the final one; the manifest comes last, then
one rename makes it visible. Importing this never imports torch: `harness checkpoints` reads with it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from harness.checkpoint.format import strict_json
from harness.checkpoint.format.ranges import Range as Range
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.format.strict_json import is_count, is_number, is_texts
from harness.errors import CheckpointError, DamagedError
from harness.io.durable_files import replace_file, sync_directory

MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
STATES = "states.safetensors"
FORMAT = "harness-checkpoint"
# 1 had the XXH3-128 of each range as a whole.
VERSION = 2
_NUM_REMOVALS = 10
TEMPORARY_PREFIX = ".tmp-"
DAMAGED_PREFIX = "damaged-"
# A thousand ranks with a thousand tensors each write a twentieth of that.
_LIMIT_BYTES = 1 << 30


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
    ranges: Sequence[Range]


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

    @property
    def can_be_resumed(self) -> bool:
        """Whether training can go on from it: not from weights alone."""
        return any(file.name == TRAINER_STATE for file in self.files)


def temporary_of(final: Path, attempt: str) -> Path:
    """The directory in which the checkpoint `final` is written; `attempt` makes it nobody else's.

    A writer that an earlier job has left behind writes into that job's directory, not into this one.
    """
    return final.with_name(f"{TEMPORARY_PREFIX}{final.name}-{attempt}")


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Write the manifest and make the checkpoint visible under its final name.

    Effects: not collective; any thread; blocks until the disk has it; leaves `final`, complete.

    Raises:
        CheckpointError: if there is a checkpoint of that name already, or the manifest would not be JSON.
    """
    if final.exists():
        raise CheckpointError(f"{final}: there is a checkpoint of that name already")
    try:
        text = manifest_text(manifest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{final}: its manifest cannot be written: {error}") from error
    replace_file(temporary / MANIFEST, text)
    os.rename(temporary, final)
    sync_directory(final.parent)


def discard(temporary: Path) -> None:
    """Remove what an unfinished save has left, as far as that is possible."""
    shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(checkpoints_dir: Path) -> None:
    """Remove what saves that were cut off have left.

    Effects: not collective; any thread; blocks at most a second for the writer of a rank that was killed, which
    ends after what it is at, and makes anew meanwhile what is removed.
    """
    for _ in range(_NUM_REMOVALS):
        left = list(checkpoints_dir.glob(f"{TEMPORARY_PREFIX}*"))
        for path in left:
            discard(path)
        if not left:
            return
        time.sleep(0.1)


def set_aside(checkpoint: Path) -> Path:
    """Take its name from a checkpoint that was found damaged, so that another can have it; its new path.

    Effects: not collective; any thread; blocks until the disk has it; removes nothing. No list has it any more.

    Raises:
        OSError: if the disk refuses.
    """
    aside = checkpoint.with_name(f"{DAMAGED_PREFIX}{checkpoint.name}-{uuid.uuid4().hex[:8]}")
    os.rename(checkpoint, aside)
    sync_directory(checkpoint.parent)
    return aside


def names_set_aside(checkpoints_dir: Path) -> list[str]:
    """Names of what `set_aside` has left."""
    return sorted(path.name for path in checkpoints_dir.glob(f"{DAMAGED_PREFIX}*"))


def manifest_text(manifest: Manifest) -> str:
    """What ``manifest.json`` holds: strict JSON, with a checksum of all the rest of it.

    The digests in the manifest cover every other file; this covers the digests.

    Raises:
        TypeError: if something in it is no JSON.
        ValueError: if a number in it is not finite.
    """
    files = [_file_values(file) for file in manifest.files]
    rest = {field.name: getattr(manifest, field.name) for field in fields(manifest) if field.name != "files"}
    record = {"format": FORMAT, "version": VERSION, **rest, "files": files}
    return json.dumps({**record, "checksum": strict_json.checksum(record)}, indent=1)


def read_manifest(checkpoint: Path) -> Manifest:
    """Read the manifest of one checkpoint directory.

    Effects: not collective; any thread; blocks for reading one file; nothing on disk.

    Raises:
        DamagedError: if there is none, or it is not what was written.
        CheckpointError: if it is of another version of the format, or the disk does not give it.
    """
    path = checkpoint / MANIFEST
    try:
        record = strict_json.read(path, _LIMIT_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _NoManifest(f"{checkpoint}: has no {MANIFEST}, so it is not a whole checkpoint") from error
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise DamagedError(f"{path}: is damaged: {error}; use another checkpoint") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DamagedError(f"{path}: is not the manifest of a {FORMAT}")
    try:
        if record.get("version") != VERSION or not is_count(record["version"]):
            told = f"{path}: has version {record.get('version')}, this harness reads {VERSION}"
            if _is_as_written(record):
                # No damage: to pass it by would be to train again what another harness has trained.
                is_older = is_count(record.get("version")) and record["version"] < VERSION
                remedy = "use the harness that has written it" if is_older else "update it"
                raise CheckpointError(f"{told}; {remedy}, or give another run_name")
            raise DamagedError(f"{told}, and is damaged; use another checkpoint")
        manifest = _manifest(record)
        _require(_is_as_written(record), "its checksum is not that of what it holds")
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: is damaged: {error}; use another checkpoint") from error
    return manifest


def _is_as_written(record: Mapping[str, Any]) -> bool:
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return record.get("checksum") == strict_json.checksum(rest)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file of a checkpoint: one that is not there is damage, a disk in trouble is none."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return DamagedError(f"{path}: {error.strerror}; use another checkpoint")
    return CheckpointError(f"{path}: cannot be read: {error.strerror}; see to the disk and start again")


class _NoManifest(DamagedError):
    """What is no checkpoint at all, as against a damaged one."""


class Scan(NamedTuple):
    """What is in a directory of checkpoints.

    Args:
        good: name and manifest of each committed checkpoint, oldest first.
        bad: name of each that has a manifest which cannot be taken, with the reason; by name.
    """

    good: Sequence[tuple[str, Manifest]]
    bad: Sequence[tuple[str, str]]


def scan_checkpoints(checkpoints_dir: Path, read: Callable[[Path], Manifest] = read_manifest) -> Scan:
    """Find the committed checkpoints; one that is damaged does not hide the others, one set aside is left out.

    Effects: not collective; any thread; blocks for reading every manifest; nothing on disk.

    Args:
        checkpoints_dir: of a run; missing: there are none.
        read: how a manifest is read.

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
    """Name and manifest of each good checkpoint, oldest first; `scan_checkpoints` tells of the others too."""
    return scan_checkpoints(checkpoints_dir).good


def _manifest(record: dict[str, Any]) -> Manifest:
    """The record as what it is, each value looked at.

    Raises:
        ValueError: if something is missing, of another type, or cannot be.
    """
    missing = {"checksum", *(key for key in Manifest.__dataclass_fields__)} - record.keys()
    _require(not missing, f"it has no {', '.join(sorted(missing))}")
    _require(isinstance(record["key"], str), "key is no text")
    for name in ("epoch", "step", "time_ms"):
        _require(is_count(record[name]), f"{name} is no whole number from 0 on")
    for name in ("metrics", "topology", "versions", "save"):
        _require(isinstance(record[name], dict), f"{name} is no object")
    _require(all(is_number(value) for value in record["metrics"].values()), "metrics hold what is no number")
    _require(is_texts(record["versions"]), "versions hold what is no text")
    _require(isinstance(record["files"], list), "files is no list")
    files = tuple(_file(file) for file in record["files"])
    _require(len({file.name for file in files}) == len(files), "it names a file twice")
    return Manifest(
        key=record["key"],
        epoch=record["epoch"],
        step=record["step"],
        time_ms=record["time_ms"],
        metrics=record["metrics"],
        files=files,
        topology=record["topology"],
        versions=record["versions"],
        save=record["save"],
    )


def _file(record: Any) -> FileRecord:
    is_file = isinstance(record, dict) and {"name", "size_bytes", "ranges"} <= record.keys()
    _require(is_file, "a file has no name, size_bytes or ranges")
    name, size_bytes, ranges = record["name"], record["size_bytes"], record["ranges"]
    # It is joined to the directory's path: it must not lead out of it.
    is_name = isinstance(name, str) and name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\\0")
    _require(is_name, f"{name!r} is no name of a file in it")
    _require(is_count(size_bytes), f"{name}: size_bytes is no whole number from 0 on")
    if isinstance(ranges, dict):
        return FileRecord(name, size_bytes, _unpacked(name, ranges, size_bytes))
    _require(isinstance(ranges, list), f"{name}: ranges is no list")
    covered = 0
    parts = []
    for part in ranges:
        if not isinstance(part, list) or [type(value) for value in part] != [int, int, int, str] or part[2] < 0:
            raise ValueError(f"{name}: {part!r} is not the start, end, rank and digest of a range")
        start, end, rank, digest = part
        if start != covered or end < start:
            raise ValueError(f"{name}: a range from {start} to {end} follows one that ends at {covered}")
        covered = end
        parts.append(Range(start, end, rank, digest))
    _require(covered == size_bytes, f"{name}: its ranges end at {covered}, the file at {size_bytes}")
    return FileRecord(name, size_bytes, tuple(parts))


def _unpacked(name: str, ranges: dict[str, Any], size_bytes: int) -> Ranges:
    try:
        return Ranges.unpacked(ranges, size_bytes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _file_values(file: FileRecord) -> dict[str, Any]:
    ranges = file.ranges.packed() if isinstance(file.ranges, Ranges) else [list(part) for part in file.ranges]
    return {"name": file.name, "size_bytes": file.size_bytes, "ranges": ranges}


def _require(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise ValueError(otherwise)
