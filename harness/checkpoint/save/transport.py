"""How bytes reach the disk: every rank writes into the files (`direct`), or rank 0 writes for all (`gather`).

`choose_transport` finds out by trying which one is possible. A `Gatherer` has a gloo group of its own, created in the
main thread and used by one background thread of each rank. Rank 0 receives from the ranks in turn, a chunk at a time,
into a window of two: one is received while the other is written. A sender's chunk waits until rank 0 has room for it,
so memory is bounded on both sides.
"""

from __future__ import annotations

import mmap
import os
import uuid
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint.format.all_ranges import FileRange
from harness.checkpoint.save.plan import Plan
from harness.checkpoint.save.writer import RangeFile
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Transport = Literal["direct", "gather"]
Requested = Literal["auto", "direct", "gather", "force_direct"]

# File systems on which nodes read what other nodes have written, and may write different parts of one file at once.
# NFS is not: it guarantees the first only from close to open, and a client may write back a whole page of which it
# has half. On one node all processes share the page cache, so any file system is coherent.
COHERENT_BETWEEN_NODES = {
    "lustre": "distributed lock manager over extents",
    "gpfs": "byte-range tokens",
    "beegfs": "no write-back of partial pages in its default cache mode (buffered)",
    "ceph": "capabilities are revoked when a file is shared",
    "ocfs2": "distributed lock manager",
    "gfs2": "distributed lock manager",
    "wekafs": "coherent client cache",
}


CHUNK_BYTES = 16 << 20
_NUM_SLOTS = 2


@dataclass(frozen=True)
class View:
    """How one rank sees the directory.

    Args:
        node: the same for ranks that run on one kernel.
        sees: whether the rank found the file that rank 0 had just written.
        file_system: type by the kernel's name, or ``unknown``.
    """

    node: str
    sees: bool
    file_system: str


def choose_transport(requested: Requested, directory: Path, collectives: Collectives) -> Transport:
    """Choose how bytes reach the disk; the same on every rank.

    Effects: collective; main thread; blocks until every rank has looked; leaves nothing.

    Args:
        requested: by the configuration; ``force_direct`` also accepts a file system that is not known to be coherent.
        directory: of the checkpoints; exists on rank 0.
        collectives: of all ranks.

    Raises:
        CheckpointError: on all ranks, if ``direct`` was requested where it would write wrong files.
    """
    if requested == "gather" or collectives.world_size == 1:
        return "gather" if requested == "gather" else "direct"
    token = uuid.uuid4().hex
    probe = directory / f".probe-{collectives.broadcast_from_rank_zero('name a probe file', lambda: token)}"
    collectives.broadcast_from_rank_zero("write a probe file", lambda: _write_probe(probe))
    try:
        views = collectives.all_gather("who sees the run directory", look(probe))
    finally:
        if collectives.rank == 0:
            with suppress(OSError):
                probe.unlink()
    return decide(requested, views, directory)


def decide(requested: Requested, views: Sequence[View], directory: Path) -> Transport:
    """Choose by how each rank sees the directory; see `choose_transport`."""
    blind = [rank for rank, view in enumerate(views) if not view.sees]
    num_nodes = len({view.node for view in views})
    kinds = sorted({view.file_system for view in views})
    if blind:
        reason = f"rank {blind[0]} does not see what rank 0 writes there"
    elif requested != "force_direct" and num_nodes > 1 and any(kind not in COHERENT_BETWEEN_NODES for kind in kinds):
        reason = f"{num_nodes} nodes share it by {', '.join(kinds)}, which may lose writes of several nodes to one file"
    else:
        return "direct"
    if requested in ("direct", "force_direct"):
        # A rank cannot write into a file that it does not see; coherence is the user's to judge.
        force = "" if blind else ", or force_direct if you know that it does not"
        raise CheckpointError(
            f"checkpoint.transport: `{requested}` cannot be used in {directory}: {reason}; use auto or gather{force}"
        )
    return "gather"


def _write_probe(probe: Path) -> None:
    probe.write_text(probe.name)


def look(probe: Path) -> View:
    """Return how this rank sees the directory of a probe file that rank 0 has written."""
    try:
        sees = probe.read_text() == probe.name
    except OSError:
        sees = False
    return View(_node(), sees, file_system_of(probe.parent))


def _node() -> str:
    """Return a name that processes on one kernel share, also from different containers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def file_system_of(directory: Path, mounts: str | None = None) -> str:
    """Return the type of the file system of a directory.

    Args:
        directory: need not exist.
        mounts: content of ``/proc/mounts``; None: read it.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/mounts").read_text()
        except OSError:
            return "unknown"
    path = str(directory.resolve())
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        _, point, this_kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:
            best, kind = len(point), this_kind
    return kind


def make_gatherer(transport: Transport, collectives: Collectives, timeout_s: float) -> Gatherer | None:
    """Return this rank's gatherer, with a process group of its own; None if each rank writes.

    Effects: collective; main thread.
    """
    if transport != "gather" or collectives.world_size == 1:
        return None
    return Gatherer(dist.new_group(backend="gloo"), collectives.rank, timeout_s)


class Gatherer:
    """Moves the ranks' staging memory to rank 0.

    Effects: collective on its own group, from one background thread of each rank; blocks until rank 0 has received
    everything, at most `timeout_s` for each chunk; leaves the ranges' bytes in rank 0's files, durable.

    Args:
        group: a gloo group for this object alone.
        rank: this rank.
        timeout_s: limit for one chunk, in seconds.
    """

    def __init__(self, group: ProcessGroup, rank: int, timeout_s: float) -> None:
        self._group = group
        self._rank = rank
        self._timeout = timedelta(seconds=timeout_s)
        self._slots: list[Tensor] = []
        self._writer: ThreadPoolExecutor | None = None
        self._broken: str | None = None

    def send(self, memory: Tensor, size_bytes: int) -> None:
        """Send the first `size_bytes` of this rank's staging memory, on every rank but 0.

        Args:
            memory: shape (bytes,), uint8, in host memory.
            size_bytes: of the plan, which rank 0 has too.

        Raises:
            CheckpointError: if rank 0 does not receive it in time.
        """
        self._require_connection()
        for begin, end in _chunks(size_bytes):
            self._await(self._group.send([memory[begin:end]], 0, 0), "rank 0 to receive a part of the checkpoint")

    def receive(self, plan: Plan, directory: Path | None) -> None:
        """Receive every other rank's memory and write it, on rank 0. Without a directory it is dropped.

        Raises:
            CheckpointError: if a rank does not send in time.
            OSError: if the disk refuses. All data is still received, so that no rank waits.
        """
        self._require_connection()
        if not self._slots:
            # Page-aligned as the senders' memory, so that the same ranges bypass the page cache.
            self._slots = [torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8) for _ in range(_NUM_SLOTS)]
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="harness-gather")
        assert self._writer is not None
        all_ranges = plan.all_ranges
        assert all_ranges is not None
        files: list[RangeFile] = []
        writing: list[Future[None] | None] = [None] * _NUM_SLOTS
        failures: list[BaseException] = []
        turn = 0
        if directory is not None:
            try:
                for file in plan.layout.files:
                    files.append(RangeFile(directory / file.name))
            except OSError as error:
                failures.append(error)
        try:
            for rank, size_bytes in enumerate(all_ranges.staging_bytes):
                if rank == 0:
                    continue
                ranges = all_ranges.of_rank(rank)
                for begin, end in _chunks(size_bytes):
                    slot = turn % _NUM_SLOTS
                    turn += 1
                    _collect_failure(writing[slot], failures)
                    part = self._slots[slot][: end - begin]
                    self._await(self._group.recv([part], rank, 0), f"rank {rank} to send its part of the checkpoint")
                    if directory is not None and not failures:
                        writing[slot] = self._writer.submit(_write_chunk, files, part, ranges, begin, end)
            for future in writing:
                _collect_failure(future, failures)
            for output in files:
                output.sync()
        finally:
            # A running write needs its file.
            wait([future for future in writing if future is not None])
            for output in files:
                output.close()
        if failures:
            raise failures[0]

    def _await(self, work: object, what: str) -> None:
        try:
            work.wait(self._timeout)  # type: ignore[attr-defined]
        except RuntimeError as error:
            # gloo closes the connection, so a later wait could not succeed.
            self._broken = f"waited for {what}: {str(error).splitlines()[0]}"
            raise CheckpointError(self._broken) from error

    def _require_connection(self) -> None:
        if self._broken is not None:
            raise CheckpointError(f"an earlier save lost the connection to rank 0: {self._broken}; restart the job")


def _chunks(size_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size_bytes, CHUNK_BYTES):
        yield begin, min(begin + CHUNK_BYTES, size_bytes)


def _collect_failure(future: Future[None] | None, failures: list[BaseException]) -> None:
    if future is not None and (error := future.exception()) is not None:
        failures.append(error)


def _write_chunk(files: Sequence[RangeFile], part: Tensor, ranges: Sequence[FileRange], begin: int, end: int) -> None:
    """Write `part`, the bytes `begin` to `end` of a rank's memory, to their files."""
    data = memoryview(part.numpy())  # type: ignore[arg-type]
    for file, first, last, offset in places(ranges, begin, end):
        files[file].write(data, first - begin, last - begin, offset)


def places(ranges: Sequence[FileRange], begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the places of the bytes `begin` to `end` of a rank's memory: file, first and last byte, file offset."""
    position = bisect_right(ranges, begin, key=lambda part: part.staging + part.size)
    while position < len(ranges) and ranges[position].staging < end:
        file, offset, staging, size = ranges[position]
        first, last = max(begin, staging), min(end, staging + size)
        yield file, first, last, offset + first - staging
        position += 1
