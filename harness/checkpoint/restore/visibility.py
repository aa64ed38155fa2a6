"""Opens a checkpoint or weights on every rank; ranks that do not see the files read them from ranks that do."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import xxhash

from harness.checkpoint.format.commit import MANIFEST, FileRecord, Manifest, read_manifest
from harness.checkpoint.format.files import Files, LocalFiles
from harness.checkpoint.format.index import weight_records
from harness.checkpoint.restore.remote_files import RemoteFiles
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError

T = TypeVar("T")


class RankView(NamedTuple):
    """What one rank sees in a directory of rank 0.

    Args:
        host: name of the rank's node, for messages.
        key: identifies the content; None if the rank sees none.
    """

    host: str
    key: str | None


def open_checkpoint(
    checkpoint: Path, collectives: Collectives, remote_files: RemoteFiles, say: Callable[[str], None]
) -> tuple[Manifest, Files]:
    """Open a checkpoint that rank 0 sees. Returns its manifest, the same on every rank, and its files.

    Effects: collective; main thread; blocks until every rank has looked; nothing on disk.

    Args:
        checkpoint: its directory.
        collectives: of all ranks.
        remote_files: for the ranks that do not see it, or see another one there.
        say: a line for the user, if there are such ranks.

    Raises:
        DamagedError: on all ranks, if it is damaged on rank 0, or gone.
        CheckpointError: on all ranks, if a disk refuses.
    """

    def look() -> Manifest | None:
        if not os.path.lexists(checkpoint / MANIFEST):
            return None
        try:
            return read_manifest(checkpoint)
        except DamagedError:
            # Only rank 0's copy counts. A damaged copy of another node is treated as a missing one.
            if collectives.rank == 0:
                raise
            return None

    manifest = collectives.run_on_all_ranks(f"reading {checkpoint / MANIFEST}", look)
    key = None if manifest is None else manifest.key
    blind = _find_blind_ranks(
        checkpoint, collectives.all_gather("who sees the checkpoint", RankView(os.uname().nodename, key)), say
    )
    if not blind:
        assert manifest is not None
        return manifest, LocalFiles(checkpoint)
    found = collectives.broadcast_from_rank_zero("tell what is in the checkpoint", lambda: _present(manifest))
    return found, remote_files.files(checkpoint, [file.name for file in found.files], blind)


def open_weights(
    directory: Path, collectives: Collectives, remote_files: RemoteFiles, say: Callable[[str], None]
) -> tuple[Sequence[FileRecord], Files]:
    """Open the weights in a directory that rank 0 sees. Returns their records, the same on every rank, and the files.

    Effects, Args, Raises: as `open_checkpoint`. Ranks that have files of the same names and sizes there see it.
    """

    def look() -> tuple[FileRecord, ...] | None:
        try:
            return weight_records(directory)
        except CheckpointError:
            if collectives.rank == 0:
                raise
            return None

    records = collectives.run_on_all_ranks(f"reading what is in {directory}", look)
    key = None if records is None else _key_of(records)
    views = collectives.all_gather("who sees the weights", RankView(os.uname().nodename, key))
    blind = _find_blind_ranks(directory, views, say)
    if not blind:
        return _present(records), LocalFiles(directory)
    found = collectives.broadcast_from_rank_zero("tell what is in the directory", lambda: _present(records))
    return found, remote_files.files(directory, [record.name for record in found], blind)


def refuse_unseen_checkpoints(checkpoints_dir: Path, collectives: Collectives) -> None:
    """Refuse checkpoints that only other ranks than 0 have: the run would restart at step 0.

    It happens if nodes share no disk, and the batch system has placed rank 0 on another node.

    Effects: collective; main thread; blocks until every rank has looked; nothing on disk.

    Raises:
        CheckpointError: on all ranks, with the first rank that has one.
    """
    mine = sorted(path.parent.name for path in checkpoints_dir.glob(f"[!.]*/{MANIFEST}"))
    views = collectives.all_gather("who has checkpoints", RankView(os.uname().nodename, mine[-1] if mine else None))
    for rank, view in enumerate(views):
        if rank and view.key is not None:
            raise CheckpointError(
                f"{checkpoints_dir}: rank {rank} on {view.host} has {view.key} there, and rank 0 on {views[0].host} "
                "has none: start the run with rank 0 on that node, copy the run's directory, or give another run_name"
            )


def _key_of(records: Sequence[FileRecord]) -> str:
    plain = [(record.name, record.size_bytes, [part.digest for part in record.ranges]) for record in records]
    return xxhash.xxh3_128_hexdigest(repr(plain).encode())


def _present(found: T | None) -> T:
    assert found is not None
    return found


def _find_blind_ranks(where: Path, views: Sequence[RankView], say: Callable[[str], None]) -> list[int]:
    """Return the ranks that do not see what rank 0 sees.

    Raises:
        DamagedError: if rank 0 does not see it.
    """
    expected = views[0].key
    if expected is None:
        raise DamagedError(f"{where}: is gone; use another checkpoint")
    blind = [rank for rank, view in enumerate(views) if view.key != expected]
    if blind:
        first = views[blind[0]]
        more = f" (and {len(blind) - 1} more ranks)" if len(blind) > 1 else ""
        sees = "does not see it" if first.key is None else "sees another there"
        say(
            f"{where}: rank {blind[0]} on {first.host}{more} {sees}, which rank 0 on {views[0].host} does, so it "
            "reads the bytes from ranks that do"
        )
    return blind
