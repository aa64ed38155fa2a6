"""Where the ranks say that their part is written: a key-value store, and no collective.

Each rank's background thread puts one record for each save; rank zero's waits for all of them. The
trainers' main threads take no part.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from harness.errors import CheckpointError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Asked again after a twentieth of the time waited so far: neither late nor often.
_POLL_PART = 0.05
_MIN_POLL_S = 0.005
_MAX_POLL_S = 0.25


class Board:
    """One record of each rank for each save.

    Effects: not collective; background threads; `collect` blocks until all ranks have put theirs, at
    most as long as it is told; nothing on disk.

    Args:
        rank: this rank.
        world_size: number of ranks.
        store: a connection for this alone, or None for a single process.
        run: unique name of this attempt of the job.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, run: str) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._run = run
        self._own: dict[int, bytes] = {}
        self._stopping = threading.Event()

    def put(self, save: int, record: bytes) -> None:
        """Say how this rank's part of a save went."""
        if self._rank == 0:
            self._own[save] = record
        elif self._store is not None:
            self._store.set(self._key(save, self._rank), record)  # type: ignore[arg-type]

    def collect(self, save: int, timeout_s: float) -> list[bytes]:
        """Rank zero: every rank's record of a save, in the order of ranks.

        Raises:
            CheckpointError: if ranks have put none in time; it names them.
        """
        others = range(1, self._world_size)
        if self._store is not None:
            self._await(save, others, timeout_s)
        records = [self._own.pop(save)]
        for rank in others:
            assert self._store is not None
            key = self._key(save, rank)
            records.append(self._store.get(key))
            self._store.delete_key(key)
        return records

    def _await(self, save: int, ranks: range, timeout_s: float) -> None:
        assert self._store is not None
        begun_s = time.monotonic()
        deadline_s = begun_s + timeout_s
        missing = list(ranks)
        while missing:
            if self._store.check([self._key(save, missing[0])]):
                missing.pop(0)
                continue
            poll_s = min(max(_MIN_POLL_S, _POLL_PART * (time.monotonic() - begun_s)), _MAX_POLL_S)
            if time.monotonic() > deadline_s or self._stopping.wait(poll_s):
                missing = [rank for rank in missing if not self._store.check([self._key(save, rank)])]
                if missing:
                    why = f"after {timeout_s:.0f} s" if time.monotonic() > deadline_s else "when the run ended"
                    raise CheckpointError(
                        f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing[:8]))}"
                        f"{' and more' if len(missing) > 8 else ''} had not written their part {why}"
                    )

    def stop(self) -> None:
        """End a wait: the run is over."""
        self._stopping.set()

    def _key(self, save: int, rank: int) -> str:
        return f"harness/checkpoint/{self._run}/{save}/{rank}"
