"""Whether every rank sees a checkpoint: each reads its own part of it, so resuming needs a directory of all nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from harness.agreement import Agreement
from harness.checkpoint.commit import MANIFEST, Manifest, read_manifest
from harness.errors import CheckpointError, DamagedError


class Sight(NamedTuple):
    """What one rank sees where rank zero has found a checkpoint.

    Args:
        host: of the rank, for a person.
        key: of the checkpoint there; None: there is none, or no such directory.
    """

    host: str
    key: str | None


def read_shared_manifest(checkpoint: Path, agreement: Agreement) -> Manifest:
    """The manifest of a checkpoint, which is the same on every rank.

    The one place where it is decided what ranks do that do not see the files: today they cannot go on.

    Effects: collective; main thread; blocks until every rank has read it; nothing on disk.

    Raises:
        DamagedError: on all ranks, if it is damaged, or rank zero does not see it any more.
        CheckpointError: on all ranks, if some do not see it, or see another one.
    """

    def look() -> Manifest | None:
        # What some alone do not see is no damage: with another checkpoint it would be the same.
        return read_manifest(checkpoint) if os.path.lexists(checkpoint / MANIFEST) else None

    manifest = agreement.together(f"reading {checkpoint / MANIFEST}", look)
    sights = agreement.gather(
        "who sees the checkpoint", Sight(os.uname().nodename, None if manifest is None else manifest.key)
    )
    require_seen(checkpoint, sights)
    assert manifest is not None
    return manifest


def require_seen(checkpoint: Path, sights: Sequence[Sight]) -> None:
    """Refuse a checkpoint that rank zero sees and others do not.

    Args:
        checkpoint: its directory.
        sights: of each rank.

    Raises:
        DamagedError: if rank zero does not see it itself.
        CheckpointError: with the first rank that sees none, or another one, and its host.
    """
    expected = sights[0].key
    if expected is None:
        raise DamagedError(f"{checkpoint}: is gone; use another checkpoint")
    others = [(rank, sight) for rank, sight in enumerate(sights) if sight.key != expected]
    if not others:
        return
    rank, sight = others[0]
    more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
    sees = "does not see it" if sight.key is None else "sees another checkpoint there"
    raise CheckpointError(
        f"{checkpoint}: rank {rank} on {sight.host}{more} {sees}, which rank 0 on {sights[0].host} does; resuming "
        "needs a directory that all nodes share: put run_dir, or a copy of the checkpoint under the same path, on each"
    )
