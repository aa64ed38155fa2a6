"""The writer process: writes a rank's staging memory to disk, without costing the training time.

A process beside each rank: with thousands of small tensors, a thread would take the GIL from the training thousands of
times. It maps the rank's staging memory, never imports torch, runs at low priority, and ends when its standard input
does. The protocol is lines of JSON; each request has one answer:

    {"memory": fd, "size": bytes, "files": [[name, bytes, header], ...], "ranges": [[file, offset, staging, size], ...]}
    {"directory": path, "ready": n}  write all ranges there  ->  {"digests": hex, "write_s": s, "sync_s": s}
    {"directory": null, "ready": n}  digests only            ->  {"digests": hex, ...}
                                                                 {"error": text}
    {"ready": n}      the first n bytes of the memory are copied; they are written while the rest is copied
    {"ready": null}   the copy has failed; no more bytes will be ready
    null              end, also if a child of the trainer keeps the pipe open

Writes bypass the page cache where the file system allows it. Through the cache each byte is copied once more by a
processor that the training needs, and evicts what the data loader reads next. With `O_DIRECT` the disk reads from the
staging memory: on two cores 6 ms of processor time for 144 MB instead of 45 to 190. It requires memory, offset and
length in whole pages. So the first and last page of a range, which it may share with a neighbour, go through the cache,
as do small ranges, and everything where the file system refuses.
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
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from harness.checkpoint.format.digest import digest_of

PAGE_BYTES = 4096
# For smaller ranges the wait for the disk at each call costs more than the copy.
MIN_DIRECT_BYTES = 256 << 10
_REFUSALS = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_NICENESS = 10
# Linux: best effort, the lowest level. https://www.kernel.org/doc/Documentation/block/ioprio.txt
_IOPRIO_CLASS_BE_LOWEST = (2 << 13) | 7
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
# Start the write-back after so many bytes, so that the final fsync has little left to do.
_FLUSH_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2


def describe_os_error(error: OSError, place: str) -> str:
    """Return a message with the file, or else `place`, the reason, and the remedy."""
    remedy = "; free space there or use another run_dir" if error.errno in _NO_SPACE else ""
    return f"{error.filename or place}: {error.strerror}{remedy}"


class OutputFile(NamedTuple):
    """One file of a checkpoint.

    Args:
        name: in the checkpoint's directory.
        size_bytes: of the whole file.
        header: its first bytes as latin-1 text; None: another rank creates the file.
    """

    name: str
    size_bytes: int
    header: str | None


def make_files(directory: Path, files: Iterable[OutputFile]) -> None:
    """Create the directory, and in it each file with its header and its final length.

    Effects: not collective; any thread; blocks for the headers only; leaves sparse files with headers. Files that
    exist, and parts of them that are written, stay.

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


class RangeFile:
    """A file of which several processes each write a part. It is created if it does not exist.

    Effects: not collective; one thread at a time; `write` blocks until the system or the disk has the bytes, `sync`
    until the disk has them.

    Attributes:
        cached_bytes: written through the page cache; the caller resets it.
    """

    def __init__(self, path: Path) -> None:
        self.cached_bytes = 0
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            with suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | flag)

    def write(self, memory: memoryview, start: int, end: int, offset: int) -> None:
        """Write ``memory[start:end]`` at `offset`.

        Args:
            memory: of bytes; page-aligned.
            start: first byte in the memory.
            end: byte after the last.
            offset: of the first byte in the file.

        Raises:
            OSError: if the disk refuses.
        """
        first = start + -offset % PAGE_BYTES
        last = end - (offset + end - start) % PAGE_BYTES
        if self._direct is not None and first % PAGE_BYTES == 0 and last - first >= MIN_DIRECT_BYTES:
            reached = self._write_directly(memory, first, last, offset + first - start)
            self._write_cached(memory[start:first], offset)
            start, offset = reached, offset + reached - start
        self._write_cached(memory[start:end], offset)

    def _write_directly(self, memory: memoryview, start: int, end: int, offset: int) -> int:
        """Write whole pages. Returns the end of what is written, before `end` if the file system refuses."""
        assert self._direct is not None
        while start < end and start % PAGE_BYTES == 0:
            try:
                count = os.pwrite(self._direct, memory[start:end], offset)
            except OSError as error:
                if error.errno not in _REFUSALS:
                    raise
                # Its pages are larger than ours, or it accepts the flag and not the writes.
                os.close(self._direct)
                self._direct = None
                break
            start, offset = start + count, offset + count
        return start

    def _write_cached(self, data: memoryview, offset: int) -> None:
        self.cached_bytes += len(data)
        while data:
            count = os.pwrite(self.descriptor, data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        """Block until the disk has everything that any process of this node has written to the file.

        Raises:
            OSError: if the disk refuses.
        """
        os.fsync(self.descriptor)

    def close(self) -> None:
        """Close the file. Call `sync` first if the disk has to have everything."""
        os.close(self.descriptor)
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None


class RangeWriter:
    """Writes ranges of a memory into files and digests them.

    Effects: not collective; any thread; blocks until the disk has everything; leaves the files' ranges.

    Args:
        memory: staging memory; page-aligned.
        files: the files of the ranges.
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
            directory: of the files; None: digest only.
            marks: yields how many bytes of the memory are ready, until all are.

        Raises:
            OSError: if the disk refuses.
        """
        begun_s = time.perf_counter()
        opened: dict[int, RangeFile] = {}
        ready_bytes = 0
        digests: list[Future[str]] = []
        # Digests are computed while the disk writes.
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
        # Only advice. Without this call the fsync does all of it.
        if self._sync_file_range is not None:
            self._sync_file_range(file.descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
        file.cached_bytes = 0


def _lower_priority() -> None:
    os.nice(_NICENESS)
    number = _IOPRIO_SET.get(os.uname().machine)
    if sys.platform == "linux" and number is not None:
        ctypes.CDLL(None).syscall(number, 1, 0, _IOPRIO_CLASS_BE_LOWEST)


def main() -> None:
    """Serve one rank until it ends."""
    _lower_priority()
    plan = json.loads(sys.stdin.readline())
    memory = memoryview(mmap.mmap(plan["memory"], plan["size"], prot=mmap.PROT_READ))
    writer = RangeWriter(memory, [OutputFile(*file) for file in plan["files"]], plan["ranges"])
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            return
        if "directory" not in request:
            continue  # it belongs to a request that has failed already
        directory = request["directory"]
        answer: dict[str, Any]
        try:
            answer = writer.write(None if directory is None else Path(directory), _marks(request["ready"]))
        except _CopyFailedError:
            answer = {"error": "the copy into host memory has failed"}
        except OSError as error:
            answer = {"error": describe_os_error(error, str(directory))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


class _CopyFailedError(Exception):
    """No more bytes will be ready."""


def _marks(ready_bytes: int) -> Iterator[int]:
    yield ready_bytes
    for line in sys.stdin:
        record = json.loads(line)
        if record is None:
            break
        if record["ready"] is None:
            raise _CopyFailedError
        yield record["ready"]
    sys.exit()  # the trainer has ended, or has requested the end


if __name__ == "__main__":
    main()
