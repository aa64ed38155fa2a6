"""Where the ranks say that their part is written: a key-value store, and no collective.

Each rank's background thread puts one record for each save; rank zero's waits for all of them, and then
tells the others how the save ended, so that all are busy, or not, alike. The trainers' main threads take
no part.
"""

from __future__ import annotations

import json
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
# Keys in one request. For as long as the answer is taken apart no other thread of this process runs.
_RANKS_AT_ONCE = 64


class CommitStore:
    """One record of each rank for each save, and how it ended.

    Effects: not collective; background threads; `collect` blocks until all ranks have put theirs, and `hear`
    until rank zero has told, at most as long as they are told; nothing on disk.

    Args:
        rank: this rank.
        world_size: number of ranks.
        store: a connection for this alone, or None for a single process.
        run: unique name of this attempt of the job.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, run: str) -> None:
        self.rank = rank
        self._world_size = world_size
        self._store = store
        self._run = run
        self._own: dict[int, bytes] = {}
        self._stopping = threading.Event()

    def put(self, save: int, record: bytes) -> None:
        """Say how this rank's part of a save went."""
        if self.rank == 0:
            self._own[save] = record
        elif self._store is not None:
            self._store.set(self._key(save, self.rank), record)  # type: ignore[arg-type]

    def collect(self, save: int, timeout_s: float) -> list[bytes]:
        """Rank zero: every rank's record of a save, in the order of ranks.

        Raises:
            CheckpointError: if ranks have put none in time; it names them.
        """
        others = range(1, self._world_size)
        missing = self._await([self._key(save, rank) for rank in others], timeout_s)
        if missing:
            ranks = [rank for rank in others if self._key(save, rank) in missing]
            raise CheckpointError(
                f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
                f"{' and more' if len(ranks) > 8 else ''} had not written their part {self._why(timeout_s)}"
            )
        records = [self._own.pop(save)]
        for first in range(1, self._world_size, _RANKS_AT_ONCE):
            assert self._store is not None
            keys = [self._key(save, rank) for rank in range(first, min(first + _RANKS_AT_ONCE, self._world_size))]
            records += self._store.multi_get(keys)
            for key in keys:
                self._store.delete_key(key)
        return records

    def tell(self, save: int, outcome: str | None) -> None:
        """Rank zero: how a save ended; None: it is committed."""
        if self._store is not None:
            self._store.set(self._key(save, 0), json.dumps(outcome))
            # Every rank has put its record of this save after it had heard of the one before.
            self._store.delete_key(self._key(save - 1, 0))

    def hear(self, save: int, timeout_s: float) -> str | None:
        """The other ranks: what rank zero tells of a save.

        Raises:
            CheckpointError: if it tells nothing in time.
        """
        assert self._store is not None
        key = self._key(save, 0)
        if self._await([key], timeout_s):
            raise CheckpointError(f"rank 0 had not finished the checkpoint {self._why(timeout_s)}")
        outcome: str | None = json.loads(self._store.get(key))
        return outcome

    def _await(self, keys: list[str], timeout_s: float) -> list[str]:
        """Wait until all of them are there; those that are still missing when there is no more time."""
        begun_s = time.monotonic()
        missing = list(keys)
        while missing:
            assert self._store is not None
            # One round trip for many of them: a thousand, one by one, are a tenth of a second.
            if self._store.check(missing[:_RANKS_AT_ONCE]):
                del missing[:_RANKS_AT_ONCE]
                continue
            waited_s = time.monotonic() - begun_s
            poll_s = min(max(_MIN_POLL_S, _POLL_PART * waited_s), _MAX_POLL_S)
            if waited_s > timeout_s or self._stopping.wait(poll_s):
                store = self._store
                return [key for key in missing if not store.check([key])]
        return []

    def _why(self, timeout_s: float) -> str:
        return "when the run ended" if self._stopping.is_set() else f"after {timeout_s:.0f} s"

    def stop(self) -> None:
        """End a wait: the run is over."""
        self._stopping.set()

    def _key(self, save: int, rank: int) -> str:
        return f"harness/checkpoint/{self._run}/{save}/{rank}"
