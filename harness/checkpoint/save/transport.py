"""Whether every rank may write into the files itself, or rank zero writes for all: found out by trying."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

Transport = Literal["direct", "gather"]
Asked = Literal["auto", "direct", "gather", "force_direct"]

# File systems on which a byte that one node has written is what another node then reads, and in which
# nodes may write different parts of one file at once. NFS is neither: it promises as much from close to
# open, and a client may write back a whole page of which it knows half. On one node, the page cache is
# everybody's, and any file system will do. (docs/guides/cluster.md has the table for people.)
COHERENT_BETWEEN_NODES = {
    "lustre": "distributed lock manager over extents",
    "gpfs": "byte-range tokens",
    "beegfs": "no write-back of partial pages in its default cache mode (buffered)",
    "ceph": "capabilities are revoked when a file is shared",
    "ocfs2": "distributed lock manager",
    "gfs2": "distributed lock manager",
    "wekafs": "coherent client cache",
}


@dataclass(frozen=True)
class View:
    """How one rank sees the directory.

    Args:
        node: the same for ranks that run on one kernel.
        sees: whether it found there what rank zero had just written.
        file_system: its type as the kernel calls it, or ``unknown``.
    """

    node: str
    sees: bool
    file_system: str


def choose(asked: Asked, directory: Path, collectives: Collectives) -> Transport:
    """How bytes shall reach the disk; the same answer on every rank.

    Effects: collective; main thread; blocks until every rank has looked; leaves nothing.

    Args:
        asked: the configuration's wish; ``force_direct``: on a file system that is not known to be coherent, too.
        directory: where checkpoints go; rank zero's exists.
        collectives: of all ranks.

    Raises:
        CheckpointError: on all ranks, if ``direct`` was asked for where it would write wrong files.
    """
    if asked == "gather" or collectives.world_size == 1:
        return "gather" if asked == "gather" else "direct"
    token = uuid.uuid4().hex
    probe = directory / f".probe-{collectives.broadcast_from_rank_zero('name a probe file', lambda: token)}"
    collectives.broadcast_from_rank_zero("write a probe file", lambda: _write(probe))
    try:
        views = collectives.all_gather("who sees the run directory", look(probe))
    finally:
        if collectives.rank == 0:
            with suppress(OSError):
                probe.unlink()
    return decide(asked, views, directory)


def decide(asked: Asked, views: Sequence[View], directory: Path) -> Transport:
    """The choice, given how each rank sees the directory; see `choose`."""
    blind = [rank for rank, view in enumerate(views) if not view.sees]
    num_nodes = len({view.node for view in views})
    kinds = sorted({view.file_system for view in views})
    if blind:
        reason = f"rank {blind[0]} does not see what rank 0 writes there"
    elif asked != "force_direct" and num_nodes > 1 and any(kind not in COHERENT_BETWEEN_NODES for kind in kinds):
        reason = f"{num_nodes} nodes share it by {', '.join(kinds)}, which does not promise that their writes add up"
    else:
        return "direct"
    if asked in ("direct", "force_direct"):
        # Nobody can write into a file that is not there; how writes add up is another matter.
        force = "" if blind else ", or force_direct where you know that it does"
        raise CheckpointError(
            f"checkpoint.transport: `{asked}` cannot be used in {directory}: {reason}; use auto or gather{force}"
        )
    return "gather"


def _write(probe: Path) -> None:
    probe.write_text(probe.name)


def look(probe: Path) -> View:
    """How this rank sees the directory of a probe file that rank zero has written."""
    try:
        sees = probe.read_text() == probe.name
    except OSError:
        sees = False
    return View(_node(), sees, file_system_of(probe.parent))


def _node() -> str:
    """What is the same for processes on one kernel, containers included."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return os.uname().nodename


def file_system_of(directory: Path, mounts: str | None = None) -> str:
    """Type of the file system that a directory is on.

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
