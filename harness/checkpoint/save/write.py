"""The trainer's side of the writer process: started with the staging memory, asked once for each save."""

from __future__ import annotations

import json
import os
import select
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.checkpoint.format.all_ranges import FileRange
from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.layout import Layout
from harness.checkpoint.format.ranges import Range, Ranges
from harness.checkpoint.save.staging import StagingMemory
from harness.checkpoint.save.writer import OutputFile
from harness.errors import CheckpointError
from harness.io.child_process import child_command

_END_TIMEOUT_S = 30.0
# The copy must not wait for the disk: so many lines the pipe holds, however far behind the writer is.
_MAX_MARKS = 64


class WriterProcess:
    """One rank's writer.

    Effects: not collective; one thread at a time; `start` blocks until the interpreter is there if there are
    many files or long headers, `ask` and `ready` until the request is sent, `answer` until the writer is
    done; leaves the ranges' bytes in the files, on the disk itself.

    Args:
        memory: that the ranges lie in.
        layout: the files.
        ranges: this rank's.
        makes_files: whether it is the one that makes the files; the others write into them.
    """

    def __init__(
        self, memory: StagingMemory, layout: Layout, ranges: tuple[FileRange, ...], *, makes_files: bool
    ) -> None:
        self._memory = memory
        self._files = output_files(layout, with_headers=makes_files)
        self._ranges = ranges
        self._process: subprocess.Popen[bytes] | None = None
        self._is_asked = False
        self._told_bytes = 0

    def start(self) -> None:
        """Start the process, or start it again if it has died."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        descriptor = self._memory.descriptor
        self._process = subprocess.Popen(
            child_command("harness.checkpoint.save.writer"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            # Ctrl-C at the trainer lets a write in flight end.
            start_new_session=True,
        )
        plan = {"memory": descriptor, "size": self._memory.size_bytes, "files": self._files, "ranges": self._ranges}
        self._send(plan)

    def ask(self, directory: Path | None, ready_bytes: int | None = None) -> None:
        """Have all ranges written into `directory`, or (None) only digested.

        Args:
            directory: is made if it is not there.
            ready_bytes: so many bytes of the memory are there already, and `ready` tells of the others;
                None: all are.
        """
        self.start()
        self._is_asked = True
        self._told_bytes = 0
        ready_bytes = self._memory.size_bytes if ready_bytes is None else ready_bytes
        self._send({"directory": None if directory is None else str(directory.absolute()), "ready": ready_bytes})

    def ready(self, num_bytes: int | None) -> None:
        """The first so many bytes of the memory are copied; None: the rest will not come."""
        size_bytes = self._memory.size_bytes
        if num_bytes is not None:
            if num_bytes < min(size_bytes, self._told_bytes + size_bytes // _MAX_MARKS):
                return
            self._told_bytes = num_bytes
        self._send({"ready": num_bytes})

    def answer(self, timeout_s: float = 3600.0) -> tuple[bytes, dict[str, float]]:
        """Wait for what was asked: the ranges' digests, 16 bytes each, and seconds of each stage.

        Raises:
            CheckpointError: if the disk refused, or the process died, or did not answer in time; it is ended
                then.
        """
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            self._process.kill()
            self.close()
            raise CheckpointError(
                f"the writer process had not written after {timeout_s:.0f} s; look at this node's disk"
            )
        line = self._process.stdout.readline()
        self._is_asked = False
        if not line:
            code = self._process.wait()
            raise CheckpointError(
                f"the writer process ended with code {code} in the middle of a save; look at this node's memory"
            )
        record: dict[str, Any] = json.loads(line)
        if "error" in record:
            raise CheckpointError(record["error"])
        return bytes.fromhex(record["digests"]), {key: record[key] for key in ("write_s", "sync_s")}

    def give_up(self) -> None:
        """After a failure elsewhere: have it end what it was asked for, and wait until it has.

        Blocks at most 30 s; a process that is at it for longer is ended.
        """
        if self._is_asked:
            with suppress(CheckpointError):
                self.ready(None)
                self.answer(_END_TIMEOUT_S)

    def _send(self, record: dict[str, Any] | None) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(record).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise CheckpointError("the writer process is gone; see its output above") from error

    def close(self) -> None:
        """End the process, after what it is at."""
        if self._process is not None:
            with suppress(CheckpointError):
                # Not by closing the pipe alone: a child of this process, a data loader's worker, may hold it open.
                self._send(None)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # a request that it did not take is still in the buffer
                        stream.close()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with suppress(subprocess.TimeoutExpired):  # the disk does not let it go
                    self._process.wait(_END_TIMEOUT_S)
            self._process = None
            self._is_asked = False


def output_files(layout: Layout, *, with_headers: bool) -> list[OutputFile]:
    """The files as the writer process is told of them."""
    return [
        OutputFile(file.name, file.size_bytes, file.header.decode("latin-1") if with_headers else None)
        for file in layout.files
    ]


def sync_files(directory: Path, layout: Layout) -> None:
    """Wait until the disk has the headers too; the writers have waited for the rest, so little is left.

    Raises:
        OSError: if the disk refuses.
    """
    for file in layout.files:
        descriptor = os.open(directory / file.name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: Path, values: Any) -> FileRecord:
    """Write one file of JSON, on the disk itself when this returns.

    Raises:
        OSError: if the disk refuses.
    """
    data = (json.dumps(values, indent=1) + "\n").encode()
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(path.name, len(data), Ranges.of([Range(0, len(data), 0, digest_of(data))]))
