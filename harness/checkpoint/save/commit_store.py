"""The ranks' records of a save, and its outcome, in a key-value store: commits need no collective.

Each rank's background thread publishes one record for each save. Rank 0's collects all of them, and publishes how the
save ended, so that all ranks are busy, or not, alike. The main threads take no part.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from harness.distributed.collectives import Collectives
from harness.distributed.failure_monitor import connect_to_store
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# The poll interval grows with the time waited, from 5 ms to 250 ms.
_POLL_PART = 0.05
_MIN_POLL_S = 0.005
_MAX_POLL_S = 0.25
# Keys in one request. No other thread of this process runs while its answer is unpacked.
_RANKS_AT_ONCE = 64


def connect_commit_store(collectives: Collectives, attempt: str) -> CommitStore:
    """Open this rank's commit store.

    Effects: not collective; any thread; blocks for the connection if there are several ranks.

    Raises:
        CheckpointError: if there are several ranks and no store to connect to.
    """
    store = connect_to_store() if collectives.world_size > 1 else None
    if store is None and collectives.world_size > 1:
        raise CheckpointError(
            "MASTER_ADDR and MASTER_PORT are not set, so the ranks cannot report that their part is written; start "
            "them with accelerate launch, torchrun or srun with these variables"
        )
    return CommitStore(collectives.rank, collectives.world_size, store, attempt)


class CommitStore:
    """One record of each rank for each save, and the save's outcome.

    Effects: not collective; background threads; `collect_records` blocks until all ranks have published theirs, and
    `await_outcome` until rank 0 publishes the outcome, at most `timeout_s`; nothing on disk.

    Args:
        rank: this rank.
        world_size: number of ranks.
        store: a connection for this object alone; None for a single process.
        attempt: unique name of this attempt of the job.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None, attempt: str) -> None:
        self.rank = rank
        self._world_size = world_size
        self._store = store
        self._attempt = attempt
        self._own: dict[int, bytes] = {}
        self._stopping = threading.Event()

    def publish_record(self, save: int, record: bytes) -> None:
        """Publish this rank's record of a save."""
        if self.rank == 0:
            self._own[save] = record
        elif self._store is not None:
            self._store.set(self._key(save, self.rank), record)  # type: ignore[arg-type]

    def collect_records(self, save: int, timeout_s: float) -> list[bytes]:
        """Return every rank's record of a save, in the order of ranks, on rank 0.

        Raises:
            CheckpointError: if ranks have not published theirs in time; it names them.
        """
        others = range(1, self._world_size)
        missing = self._await([self._key(save, rank) for rank in others], timeout_s)
        if missing:
            ranks = [rank for rank in others if self._key(save, rank) in missing]
            raise CheckpointError(
                f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}"
                f"{' and more' if len(ranks) > 8 else ''} had not written their part {self._when(timeout_s)}"
            )
        records = [self._own.pop(save)]
        for first in range(1, self._world_size, _RANKS_AT_ONCE):
            assert self._store is not None
            keys = [self._key(save, rank) for rank in range(first, min(first + _RANKS_AT_ONCE, self._world_size))]
            records += self._store.multi_get(keys)
            for key in keys:
                self._store.delete_key(key)
        return records

    def publish_outcome(self, save: int, outcome: str | None) -> None:
        """Publish on rank 0 how a save ended; None: it is committed."""
        if self._store is not None:
            self._store.set(self._key(save, 0), json.dumps(outcome))
            # Every rank read the previous outcome before it published its record of this save.
            self._store.delete_key(self._key(save - 1, 0))

    def await_outcome(self, save: int, timeout_s: float) -> str | None:
        """Return the outcome that rank 0 publishes, on the other ranks.

        Raises:
            CheckpointError: if it is not published in time.
        """
        assert self._store is not None
        key = self._key(save, 0)
        if self._await([key], timeout_s):
            raise CheckpointError(f"rank 0 had not finished the checkpoint {self._when(timeout_s)}")
        outcome: str | None = json.loads(self._store.get(key))
        return outcome

    def _await(self, keys: list[str], timeout_s: float) -> list[str]:
        """Wait until all keys are set. Returns those that are missing at the time limit."""
        begun_s = time.monotonic()
        missing = list(keys)
        while missing:
            assert self._store is not None
            # One round trip for many keys: a thousand single ones take a tenth of a second.
            if self._store.check(missing[:_RANKS_AT_ONCE]):
                del missing[:_RANKS_AT_ONCE]
                continue
            waited_s = time.monotonic() - begun_s
            poll_s = min(max(_MIN_POLL_S, _POLL_PART * waited_s), _MAX_POLL_S)
            if waited_s > timeout_s or self._stopping.wait(poll_s):
                store = self._store
                return [key for key in missing if not store.check([key])]
        return []

    def _when(self, timeout_s: float) -> str:
        return "when the run ended" if self._stopping.is_set() else f"after {timeout_s:.0f} s"

    def stop(self) -> None:
        """End a wait, because the run ends."""
        self._stopping.set()

    def _key(self, save: int, rank: int) -> str:
        return f"harness/checkpoint/{self._attempt}/{save}/{rank}"
