"""Whether every rank sees what is to be read; those that do not have it from ranks that do."""

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
    """What one rank sees where rank zero has found something.

    Args:
        host: of the rank, for a person.
        key: of what is there; None: there is nothing, or no such directory.
    """

    host: str
    key: str | None


def open_checkpoint(
    checkpoint: Path, collectives: Collectives, relay: RemoteFiles, say: Callable[[str], None]
) -> tuple[Manifest, Files]:
    """The manifest of a checkpoint that rank zero sees, and its files; the same on every rank.

    Effects: collective; main thread; blocks until every rank has looked; nothing on disk.

    Args:
        checkpoint: its directory.
        collectives: of all ranks.
        relay: for the ranks that do not see it, or see another one there.
        say: a line for the user, where there are such.

    Raises:
        DamagedError: on all ranks, if it is damaged where rank zero sees it, or is gone.
        CheckpointError: on all ranks, if a disk does not give it.
    """

    def look() -> Manifest | None:
        if not os.path.lexists(checkpoint / MANIFEST):
            return None
        try:
            return read_manifest(checkpoint)
        except DamagedError:
            # Rank zero's counts. A copy that this node alone has is no more than one that is not there.
            if collectives.rank == 0:
                raise
            return None

    manifest = collectives.run_on_all_ranks(f"reading {checkpoint / MANIFEST}", look)
    key = None if manifest is None else manifest.key
    blind = _blind(
        checkpoint, collectives.all_gather("who sees the checkpoint", RankView(os.uname().nodename, key)), say
    )
    if not blind:
        assert manifest is not None
        return manifest, LocalFiles(checkpoint)
    found = collectives.broadcast_from_rank_zero("tell what is in the checkpoint", lambda: _present(manifest))
    return found, relay.files(checkpoint, [file.name for file in found.files], blind)


def open_weights(
    directory: Path, collectives: Collectives, relay: RemoteFiles, say: Callable[[str], None]
) -> tuple[Sequence[FileRecord], Files]:
    """The files of weights in a directory that rank zero sees; the same on every rank.

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
    blind = _blind(directory, collectives.all_gather("who sees the weights", RankView(os.uname().nodename, key)), say)
    if not blind:
        return _present(records), LocalFiles(directory)
    found = collectives.broadcast_from_rank_zero("tell what is in the directory", lambda: _present(records))
    return found, relay.files(directory, [record.name for record in found], blind)


def refuse_others_alone(checkpoints_dir: Path, collectives: Collectives) -> None:
    """Where rank zero has no checkpoint of the run: nobody else may have one, or the run would begin again.

    Nodes that share no disk, and a batch system that has put rank zero on another one.

    Effects: collective; main thread; blocks until every rank has looked; nothing on disk.

    Raises:
        CheckpointError: on all ranks, with the first rank that has one.
    """
    mine = sorted(path.parent.name for path in checkpoints_dir.glob(f"[!.]*/{MANIFEST}"))
    sights = collectives.all_gather("who has checkpoints", RankView(os.uname().nodename, mine[-1] if mine else None))
    for rank, sight in enumerate(sights):
        if rank and sight.key is not None:
            raise CheckpointError(
                f"{checkpoints_dir}: rank {rank} on {sight.host} has {sight.key} there, and rank 0 on {sights[0].host} "
                "has none: start the run with rank 0 on that node, copy the run's directory, or give another run_name"
            )


def _key_of(records: Sequence[FileRecord]) -> str:
    plain = [(record.name, record.size_bytes, [part.digest for part in record.ranges]) for record in records]
    return xxhash.xxh3_128_hexdigest(repr(plain).encode())


def _present(found: T | None) -> T:
    assert found is not None
    return found


def _blind(where: Path, sights: Sequence[RankView], say: Callable[[str], None]) -> list[int]:
    """The ranks that do not see what rank zero sees.

    Raises:
        DamagedError: if rank zero does not see it itself.
    """
    expected = sights[0].key
    if expected is None:
        raise DamagedError(f"{where}: is gone; use another checkpoint")
    blind = [rank for rank, sight in enumerate(sights) if sight.key != expected]
    if blind:
        first = sights[blind[0]]
        more = f" (and {len(blind) - 1} more ranks)" if len(blind) > 1 else ""
        sees = "does not see it" if first.key is None else "sees another there"
        say(
            f"{where}: rank {blind[0]} on {first.host}{more} {sees}, which rank 0 on {sights[0].host} does, so its "
            "bytes come from the ranks that do"
        )
    return blind
