"""The writer process: puts a rank's staging memory on the disk, out of the trainer's way.

A process of its own, beside each rank: with thousands of small tensors a thread would take the GIL from
the training thousands of times. It maps the rank's staging memory, knows nothing of torch, runs at low
priority, and ends when its standard input does. JSON lines, of which a request has one answer:

    {"memory": fd, "size": bytes, "files": [[name, bytes, header], ...], "ranges": [[file, offset, staging, size], ...]}
    {"directory": path, "ready": n}  write all ranges there  ->  {"digests": hex, "write_s": s, "sync_s": s}
    {"directory": null, "ready": n}  digests alone           ->  {"digests": hex, ...}
                                                                 {"error": text}
    {"ready": n}      the first n bytes of the memory are copied: it writes while the rest still is
    {"ready": null}   there will be no more of them: the copy has failed
    null              the end, also where somebody else has inherited the pipe
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.save.direct_io import RangeFile

_NICENESS = 10
# Linux: best effort, the lowest of its levels. https://www.kernel.org/doc/Documentation/block/ioprio.txt
_IOPRIO_CLASS_BE_LOWEST = (2 << 13) | 7
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
# Start the disk on what is written so far, so that the fsync at the end has little left to do.
_FLUSH_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def told(error: OSError, place: str) -> str:
    """What the disk has refused, where, and what helps."""
    remedy = "; free space there or use another run_dir" if error.errno in _NO_SPACE else ""
    return f"{error.filename or place}: {error.strerror}{remedy}"


class OutputFile(NamedTuple):
    """One file of a checkpoint.

    Args:
        name: in the checkpoint's directory.
        size_bytes: of all of it.
        header: the bytes that it begins with, as latin-1 text; None: somebody else makes the file.
    """

    name: str
    size_bytes: int
    header: str | None


def make_files(directory: Path, files: Iterable[OutputFile]) -> None:
    """Make the directory, and in it each file with its header and its final length.

    Effects: not collective; any thread; blocks for the headers alone; leaves files of holes and headers.
    Files and parts of them that are there already stay.

    Raises:
        OSError: if the disk refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for file in files:
        if file.header is not None:
            descriptor = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with open(descriptor, "wb") as stream:
                stream.write(file.header.encode("latin-1"))
                stream.truncate(file.size_bytes)


class RangeWriter:
    """Writes ranges of a memory into files and digests them.

    Effects: not collective; any thread; blocks until the disk has everything; leaves the files' ranges.

    Args:
        memory: staging memory; it begins at a page.
        files: that the ranges are of.
        ranges: (index into `files`, offset in the file, offset in the memory, size), in bytes, in the
            order of the memory.
    """

    def __init__(self, memory: memoryview, files: Sequence[OutputFile], ranges: Sequence[Sequence[int]]) -> None:
        self._memory = memory
        self._files = files
        self._ranges = ranges
        self._sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)

    def write(self, directory: Path | None, marks: Iterator[int]) -> dict[str, Any]:
        """Digest all ranges, and write them.

        Args:
            directory: where to; None: nowhere.
            marks: how many bytes of the memory are ready, again and again until all are.

        Raises:
            OSError: if the disk refuses.
        """
        begun_s = time.perf_counter()
        opened: dict[int, RangeFile] = {}
        ready_bytes = 0
        digests: list[Future[str]] = []
        # While the disk is at it.
        with ThreadPoolExecutor(1) as digesting:
            try:
                if directory is not None:
                    make_files(directory, self._files)
                for number, offset, staging, size in self._ranges:
                    while ready_bytes < staging + size:
                        ready_bytes = next(marks)
                    digests.append(digesting.submit(self._digest, staging, size))
                    if directory is None:
                        continue
                    if number not in opened:
                        opened[number] = RangeFile(directory / self._files[number].name)
                    file = opened[number]
                    file.write(self._memory, staging, staging + size, offset)
                    if file.cached_bytes >= _FLUSH_BYTES:
                        self._start_flush(file)
                written_s = time.perf_counter()
                for file in opened.values():
                    file.sync()
                synced_s = time.perf_counter()
            finally:
                for file in opened.values():
                    file.close()
            return {
                "digests": "".join(digest.result() for digest in digests),
                "write_s": written_s - begun_s,
                "sync_s": synced_s - written_s,
            }

    def _digest(self, staging: int, size: int) -> str:
        return digest_of(self._memory[staging : staging + size])

    def _start_flush(self, file: RangeFile) -> None:
        # Advice: where the system does not know it, the fsync does it all.
        if self._sync_file_range is not None:
            self._sync_file_range(file.descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
        file.cached_bytes = 0


def _lower_priority() -> None:
    os.nice(_NICENESS)
    number = _IOPRIO_SET.get(os.uname().machine)
    if sys.platform == "linux" and number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_CLASS_BE_LOWEST)


def main() -> None:
    """Serve one rank until it is gone."""
    _lower_priority()
    plan = json.loads(sys.stdin.readline())
    memory = memoryview(mmap.mmap(plan["memory"], plan["size"], prot=mmap.PROT_READ))
    writer = RangeWriter(memory, [OutputFile(*file) for file in plan["files"]], plan["ranges"])
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            return
        if "directory" not in request:
            continue  # of a request that has failed before it came
        directory = request["directory"]
        answer: dict[str, Any]
        try:
            answer = writer.write(None if directory is None else Path(directory), _marks(request["ready"]))
        except _CopyFailedError:
            answer = {"error": "the copy into host memory has failed"}
        except OSError as error:
            answer = {"error": told(error, str(directory))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class _CopyFailedError(Exception):
    """There will be no more bytes."""


def _marks(ready_bytes: int) -> Iterator[int]:
    yield ready_bytes
    for line in sys.stdin:
        record = json.loads(line)
        if record is None:
            break
        if record["ready"] is None:
            raise _CopyFailedError
        yield record["ready"]
    sys.exit()  # the trainer is gone, or wants this to end


if __name__ == "__main__":
    main()
