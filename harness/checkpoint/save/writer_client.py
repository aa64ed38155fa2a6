"""The trainer's side of the writer process: starts it with the staging memory, and sends one request for each save."""

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
from harness.checkpoint.save.snapshot import StagingMemory
from harness.checkpoint.save.writer import OutputFile
from harness.errors import CheckpointError
from harness.io.child_process import child_command

_END_TIMEOUT_S = 30.0
# The copy must not wait for the disk: the pipe has room for so many lines, however slow the writer is.
_MAX_MARKS = 64


class WriterProcess:
    """One rank's writer process.

    Effects: not collective; one thread at a time; `start` blocks until the interpreter runs if there are many files or
    long headers, `request` and `report_ready` until the line is sent, `await_digests` until the writer is done;
    leaves the ranges' bytes in the files, durable.

    Args:
        memory: with the bytes of the ranges.
        layout: of the files.
        ranges: this rank's.
        makes_files: create the files; the writers of other ranks write into them.
    """

    def __init__(
        self, memory: StagingMemory, layout: Layout, ranges: tuple[FileRange, ...], *, makes_files: bool
    ) -> None:
        self._memory = memory
        self._files = output_files(layout, with_headers=makes_files)
        self._ranges = ranges
        self._process: subprocess.Popen[bytes] | None = None
        self._is_busy = False
        self._reported_bytes = 0

    def start(self) -> None:
        """Start the process, if it does not run."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        descriptor = self._memory.descriptor
        self._process = subprocess.Popen(
            child_command("harness.checkpoint.save.writer"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(descriptor,),
            # Ctrl-C ends the trainer, not a write in flight.
            start_new_session=True,
        )
        plan = {"memory": descriptor, "size": self._memory.size_bytes, "files": self._files, "ranges": self._ranges}
        self._send(plan)

    def request(self, directory: Path | None, ready_bytes: int | None = None) -> None:
        """Request that all ranges are written and digested.

        Args:
            directory: of the files; created if it does not exist. None: digest only.
            ready_bytes: how many bytes of the memory are copied; `report_ready` reports the others. None: all.

        Raises:
            CheckpointError: if the process has died.
        """
        self.start()
        self._is_busy = True
        self._reported_bytes = 0
        ready_bytes = self._memory.size_bytes if ready_bytes is None else ready_bytes
        self._send({"directory": None if directory is None else str(directory.absolute()), "ready": ready_bytes})

    def report_ready(self, num_bytes: int | None) -> None:
        """Report that the first `num_bytes` of the memory are copied; None: the copy has failed.

        Raises:
            CheckpointError: if the process has died.
        """
        size_bytes = self._memory.size_bytes
        if num_bytes is not None:
            if num_bytes < min(size_bytes, self._reported_bytes + size_bytes // _MAX_MARKS):
                return
            self._reported_bytes = num_bytes
        self._send({"ready": num_bytes})

    def await_digests(self, timeout_s: float = 3600.0) -> tuple[bytes, dict[str, float]]:
        """Block until the request is done. Returns the ranges' digests, 16 bytes each, and seconds of each stage.

        Raises:
            CheckpointError: if the disk refuses, the process dies, or exceeds the time limit, which kills it.
        """
        assert self._process is not None and self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            self._process.kill()
            self.close()
            raise CheckpointError(
                f"the writer process had not written after {timeout_s:.0f} s; look at this node's disk"
            )
        line = self._process.stdout.readline()
        self._is_busy = False
        if not line:
            code = self._process.wait()
            raise CheckpointError(
                f"the writer process ended with code {code} in the middle of a save; look at this node's memory"
            )
        record: dict[str, Any] = json.loads(line)
        if "error" in record:
            raise CheckpointError(record["error"])
        return bytes.fromhex(record["digests"]), {key: record[key] for key in ("write_s", "sync_s")}

    def cancel(self) -> None:
        """Cancel the request after a failure elsewhere. Blocks at most 30 s; a slower process is killed."""
        if self._is_busy:
            with suppress(CheckpointError):
                self.report_ready(None)
                self.await_digests(_END_TIMEOUT_S)

    def _send(self, record: dict[str, Any] | None) -> None:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(record).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise CheckpointError("the writer process has died; see its output above") from error

    def close(self) -> None:
        """End the process, after the request in flight."""
        if self._process is not None:
            with suppress(CheckpointError):
                # Closing the pipe is not enough: a child of this process, such as a loader's worker, may keep it open.
                self._send(None)
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # a line that it did not read is still in the buffer
                        stream.close()
            try:
                self._process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with suppress(subprocess.TimeoutExpired):  # it is blocked on the disk
                    self._process.wait(_END_TIMEOUT_S)
            self._process = None
            self._is_busy = False


def output_files(layout: Layout, *, with_headers: bool) -> list[OutputFile]:
    """Describe the files of a layout for the writer process."""
    return [
        OutputFile(file.name, file.size_bytes, file.header.decode("latin-1") if with_headers else None)
        for file in layout.files
    ]


def sync_files(directory: Path, layout: Layout) -> None:
    """Block until the disk has the headers too. The writers have synced the rest.

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
    """Write one file of JSON, durable when this returns.

    Raises:
        OSError: if the disk refuses.
    """
    data = (json.dumps(values, indent=1) + "\n").encode()
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileRecord(path.name, len(data), Ranges.of([Range(0, len(data), 0, digest_of(data))]))
