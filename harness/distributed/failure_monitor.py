"""One rank fails, all ranks stop: the reason travels through the rendezvous store, not a collective.

A rank that raises writes its reason under one key. Each rank's watcher thread looks at that key; the
main thread sees it at its next step. A main thread that is stuck in a collective with the dead rank
is given a few seconds, then the watcher ends the process: nobody waits for a time-out.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed import DistError, FileStore, TCPStore  # type: ignore[attr-defined]

from harness.distributed.meeting import latest_meeting
from harness.errors import PeerFailure, Stopped, reason_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_S = 0.5
# How long a main thread has to come out of its collective by itself (gloo notices a dead peer at once).
_GRACE_S = 5.0
# Runs of this process: every rank begins each of them.
_num_runs = itertools.count()


class FailureMonitor:
    """Tells the other ranks that this one failed, and learns that another did.

    Effects: not collective; `report` and `check` from the main thread; a daemon thread with its own
    connection to the store; nothing on disk.

    Args:
        rank: this rank.
        world_size: number of ranks; with 1 there is nothing to watch.
        last_words: called by the watcher just before it ends a process that is stuck.

    Attributes:
        failure: another rank's; None: none is known.
    """

    def __init__(self, rank: int, world_size: int, last_words: Callable[[PeerFailure], None]) -> None:
        self._rank = rank
        self._last_words = last_words
        self._closing = threading.Event()
        self.failure: PeerFailure | None = None
        # Of this start of the ranks, and of this run in it: what an earlier one has left at the same store is not told
        # again. A notebook, or a script that tries once more with less, trains on in processes where a run has failed.
        meeting = latest_meeting()
        which = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if meeting is None else meeting.name
        self._key = f"harness/failed/{which}/{next(_num_runs)}"
        self._store = connect() if world_size > 1 else None
        if self._store is not None:
            threading.Thread(target=self._watch, name="harness-peers", daemon=True).start()

    def check(self) -> None:
        """Raise if another rank has failed. Costs one attribute.

        Raises:
            PeerFailure: with that rank's reason.
        """
        if self.failure is not None:
            raise self.failure

    def report(self, error: BaseException) -> None:
        """Tell the others why this rank stops, unless it stops because of one of them."""
        self._closing.set()
        if self._store is None or isinstance(error, PeerFailure):
            return
        reason = reason_of(error)
        signal_name = error.signal_name if isinstance(error, Stopped) else None
        record = json.dumps({"rank": self._rank, "reason": reason, "signal": signal_name})
        # A store that is gone went with the rank that kept it, and that rank is noticed missing.
        with suppress(RuntimeError):
            # The first reason is the cause; what follows is its consequence.
            self._store.compare_set(self._key, "", record)

    def cause(self, error: BaseException) -> BaseException:
        """What really ended this rank: a peer's failure, where one was reported, rather than its echo."""
        if self._store is None or isinstance(error, Stopped):
            return error
        try:
            found = self._read()
        except RuntimeError:
            found = None
        # What fails on all ranks alike is nobody's echo.
        if found is not None and found.rank != self._rank and found.reason != reason_of(error):
            return found
        if _is_broken_collective(error):
            return PeerFailure(
                None,
                "the connection to another rank broke; it was killed, or ran out of memory "
                f"(see its own output): {_first_line(error)}",
            )
        return error

    def close(self) -> None:
        """Stop watching: from here on the ranks part in good order."""
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(_POLL_S):
            try:
                found = self._read()
            except RuntimeError:
                found = PeerFailure(None, "the rendezvous store is gone, and with it the rank that kept it")
            if found is None or found.rank == self._rank:
                continue
            self.failure = found
            if not self._closing.wait(_GRACE_S):
                self._last_words(found)
                os._exit(1)
            return

    def _read(self) -> PeerFailure | None:
        assert self._store is not None
        if not self._store.check([self._key]):
            return None
        record = json.loads(self._store.get(self._key))
        return PeerFailure(record["rank"], record["reason"], record["signal"])


def _is_broken_collective(error: BaseException) -> bool:
    """Whether this is how gloo or NCCL say that the other side is gone."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].partition(". This is typically")[0]


def connect() -> Store | None:
    """A connection of our own to the store that the ranks met at, or None where it cannot be named."""
    if (path := os.environ.get("ACCELERATE_DEBUG_RDV_FILE")) is not None:
        # accelerate's debug_launcher names an address too, at which nobody is. Without a number of ranks: the file is
        # not this connection's to remove.
        return FileStore(path)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))
