"""Verify every byte of a checkpoint against its digests. This module never imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from harness.checkpoint.format.commit import FileRecord, read_manifest
from harness.checkpoint.format.digest import LEAF_BYTES, in_hex, leaves_of
from harness.checkpoint.format.ranges import Range
from harness.errors import CheckpointError, RunDirError

# Must be a multiple of a leaf.
_CHUNK_BYTES = 256 * LEAF_BYTES
_NUM_THREADS = 4


@dataclass(frozen=True)
class Verified:
    """Report the result of `verify`: the files checked, and one line in `problems` for each damaged range or file."""

    num_files: int
    num_ranges: int
    size_bytes: int
    problems: tuple[str, ...]


def verify(checkpoint: Path, *, weights_only: bool = False) -> Verified:
    """Read a checkpoint, or only its files of weights, and compare every range with its digest.

    Effects: not collective; any thread; blocks on reading the files in 4 threads, each with a 4 MiB buffer.

    Raises:
        CheckpointError: if the manifest is missing or cannot be read.
    """
    manifest = read_manifest(checkpoint)
    files = [file for file in manifest.files if not weights_only or file.name in manifest.weight_files]
    problems: list[str] = []
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for file in files:
            problems += _problems(checkpoint / file.name, file, threads)
    return Verified(
        len(files), sum(len(file.ranges) for file in files), sum(file.size_bytes for file in files), tuple(problems)
    )


def require_whole(checkpoint: Path, *, weights_only: bool = False) -> None:
    """Verify a checkpoint as `verify` does.

    Raises:
        CheckpointError: if it is damaged; the message has the first problem.
    """
    problems = verify(checkpoint, weights_only=weights_only).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint}: is damaged: {problems[0]}{more}; use another checkpoint")


def _problems(path: Path, file: FileRecord, threads: ThreadPoolExecutor) -> Iterable[str]:
    try:
        size_bytes = path.stat().st_size
    except OSError as error:
        return [f"{file.name}: {error.strerror}"]
    if size_bytes != file.size_bytes:
        return [f"{file.name}: has {size_bytes} bytes, was written with {file.size_bytes}"]
    return [problem for problem in threads.map(lambda part: _problem(path, part), file.ranges) if problem]


def _problem(path: Path, part: Range) -> str | None:
    digest = 0
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            position = part.start
            while position < part.end:
                chunk = _read(descriptor, position, min(_CHUNK_BYTES, part.end - position))
                if chunk is None:
                    return f"{path.name}: ends before byte {part.end}"
                digest ^= leaves_of(chunk, (position - part.start) // LEAF_BYTES)
                position += len(chunk)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"{path.name}: bytes {part.start} to {part.end} cannot be read: {error.strerror}"
    if in_hex(digest) != part.digest:
        return f"{path.name}: bytes {part.start} to {part.end}, written by rank {part.rank}, are not what was written"
    return None


def _read(descriptor: int, position: int, size_bytes: int) -> bytes | None:
    """Read `size_bytes` from `position`; None if the file ends before."""
    found = bytearray()
    while len(found) < size_bytes:
        part = os.pread(descriptor, size_bytes - len(found), position + len(found))
        if not part:
            return None
        found += part
    return bytes(found)


def summary(checkpoint: Path, found: Verified) -> str:
    """Format the result for the user."""
    if found.problems:
        return "\n".join((f"{checkpoint}: is damaged:", *(f"  {problem}" for problem in found.problems)))
    return (
        f"{checkpoint}: {found.size_bytes:,} bytes in {found.num_files} files, {found.num_ranges} ranges: "
        "every byte is what was written"
    )


def require_checkpoint(path: Path) -> None:
    """Check that a path is the directory of a checkpoint.

    Raises:
        RunDirError: if it is not a directory.
        CheckpointError: if its manifest is missing or cannot be read.
    """
    if not path.is_dir():
        raise RunDirError(f"{path}: is not a directory; give runs/<run_name>/checkpoints/<name>")
    read_manifest(path)
