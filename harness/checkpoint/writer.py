"""The writer process: puts a rank's staging memory on the disk, out of the trainer's way.

A process of its own, beside each rank: with thousands of small tensors a thread would take the GIL from
the training thousands of times. It maps the rank's staging memory, knows nothing of torch, runs at low
priority, and ends when its standard input does. One JSON line each way:

    {"memory": fd, "size": bytes, "files": [name, ...], "ranges": [[file, offset, staging, size], ...]}
    {"directory": path}      write all ranges there      ->  {"digests": hex, "write_s": s, "sync_s": s}
    {"directory": null}      digests alone               ->  {"digests": hex, ...}
                                                             {"error": text}
    null                     the end, also where somebody else has inherited the pipe
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

from harness.checkpoint.direct_io import RangeFile

_NICENESS = 10
# Linux: best effort, the lowest of its levels. https://www.kernel.org/doc/Documentation/block/ioprio.txt
_IOPRIO_CLASS_BE_LOWEST = (2 << 13) | 7
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_DIGEST_HEX_CHARS = 32
# Start the disk on what is written so far, so that the fsync at the end has little left to do.
_FLUSH_BYTES = 32 << 20
_SYNC_FILE_RANGE_WRITE = 2


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def told(error: OSError, place: str) -> str:
    """What the disk has refused, where, and what helps."""
    remedy = "; free space there or use another run_dir" if error.errno in _NO_SPACE else ""
    return f"{error.filename or place}: {error.strerror}{remedy}"


class RangeWriter:
    """Writes ranges of a memory into files and digests them.

    Effects: not collective; any thread; blocks until the disk has everything; leaves the files' ranges.

    Args:
        memory: staging memory; it begins at a page.
        files: names.
        ranges: (index into `files`, offset in the file, offset in the memory, size), in bytes.
    """

    def __init__(self, memory: memoryview, files: Sequence[str], ranges: Sequence[Sequence[int]]) -> None:
        self._memory = memory
        self._files = files
        self._ranges = ranges
        self._libc = ctypes.CDLL(None, use_errno=True)

    def write(self, directory: Path) -> dict[str, Any]:
        """Write and digest all ranges.

        Raises:
            OSError: if the disk refuses.
        """
        begun_s = time.perf_counter()
        opened: dict[int, RangeFile] = {}
        with ThreadPoolExecutor(1) as digesting:
            # While the disk is at it.
            digests = digesting.submit(self._digests)
            try:
                for number, offset, staging, size in self._ranges:
                    if number not in opened:
                        opened[number] = RangeFile(directory / self._files[number])
                    file = opened[number]
                    file.write(self._memory, staging, staging + size, offset)
                    if file.cached_bytes >= _FLUSH_BYTES:
                        self._start_flush(file)
                written_s = time.perf_counter()
                for file in opened.values():
                    file.sync()
            finally:
                for file in opened.values():
                    file.close()
            return {
                "digests": digests.result(),
                "write_s": written_s - begun_s,
                "sync_s": time.perf_counter() - written_s,
            }

    def digest(self) -> dict[str, Any]:
        """Digest all ranges, and write nothing."""
        begun_s = time.perf_counter()
        digests = self._digests()
        return {"digests": digests, "write_s": time.perf_counter() - begun_s, "sync_s": 0.0}

    def _digests(self) -> str:
        return "".join(xxhash.xxh3_128_hexdigest(self._memory[s : s + size]) for _, _, s, size in self._ranges)

    def _start_flush(self, file: RangeFile) -> None:
        # Advice: where the system does not know it, the fsync does it all.
        self._libc.sync_file_range(file.descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _SYNC_FILE_RANGE_WRITE)
        file.cached_bytes = 0


def split_digests(text: str) -> list[str]:
    """The digests that a writer has put one after another."""
    return [text[at : at + _DIGEST_HEX_CHARS] for at in range(0, len(text), _DIGEST_HEX_CHARS)]


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
    writer = RangeWriter(memory, plan["files"], plan["ranges"])
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            return
        directory = request["directory"]
        answer: dict[str, Any]
        try:
            answer = writer.digest() if directory is None else writer.write(Path(directory))
        except OSError as error:
            answer = {"error": told(error, str(directory))}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
