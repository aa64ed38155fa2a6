"""Stop all ranks when one fails, through the rendezvous store and not through a collective.

A rank that raises writes its reason under a key. A watcher thread on each rank polls that key, and the main thread
raises at its next step. If the main thread is blocked in a collective for more than a few seconds, the watcher ends the
process, so no rank waits for a collective's time limit.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from torch.distributed import DistError, FileStore, TCPStore  # type: ignore[attr-defined]

from harness.distributed.launch_identity import latest_rendezvous
from harness.errors import PeerFailure, Stopped, reason_of

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_POLL_S = 0.5
# Time for the main thread to return from its collective (gloo detects a dead peer at once).
_GRACE_S = 5.0
# Number of runs in this process, the same on every rank.
_num_runs = itertools.count()


class AbortHandler(Protocol):
    """Is notified before the watcher thread ends a process whose main thread is blocked."""

    def before_abort(self, failure: PeerFailure) -> None:
        """Record the failure; the process ends on return."""


class FailureMonitor:
    """Reports this rank's failure to the other ranks, and detects theirs.

    Effects: not collective; `report` and `check` from the main thread; with several ranks it starts a daemon thread
    with its own connection to the store, which may end the process; nothing on disk.

    Attributes:
        failure: another rank's failure; None if none is known.
    """

    def __init__(self, rank: int, world_size: int, handler: AbortHandler | None = None) -> None:
        self._rank = rank
        self._handler = handler
        self._closing = threading.Event()
        self.failure: PeerFailure | None = None
        # Unique to this start of the ranks and this run of the process, so that reports of an earlier start in the same
        # store, or of an earlier run in a notebook, are ignored.
        rendezvous = latest_rendezvous()
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if rendezvous is None else rendezvous.name
        self._key = f"harness/failed/{start}/{next(_num_runs)}"
        self._store = connect_to_store() if world_size > 1 else None
        if self._store is not None:
            threading.Thread(target=self._watch, name="harness-failure-monitor", daemon=True).start()

    def check(self) -> None:
        """Raise if another rank has failed. Costs one attribute access.

        Raises:
            PeerFailure: with that rank's reason.
        """
        if self.failure is not None:
            raise self.failure

    def report(self, error: BaseException) -> None:
        """Report to the other ranks why this rank stops, unless another rank is the cause."""
        self._closing.set()
        if self._store is None or isinstance(error, PeerFailure):
            return
        reason = reason_of(error)
        signal_name = error.signal_name if isinstance(error, Stopped) else None
        record = json.dumps({"rank": self._rank, "reason": reason, "signal": signal_name})
        # If the store is gone, so is the rank that hosted it, which the others detect themselves.
        with suppress(RuntimeError):
            # The first reason is the cause; later ones are consequences.
            self._store.compare_set(self._key, "", record)

    def root_cause(self, error: BaseException) -> BaseException:
        """Return the failure of another rank if `error` is only its consequence, else `error`."""
        if self._store is None or isinstance(error, Stopped):
            return error
        try:
            found = self._read()
        except RuntimeError:
            found = None
        # An error that all ranks raise alike is not a consequence.
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
        """Stop watching, because the other ranks end normally from here on."""
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
                if self._handler is not None:
                    self._handler.before_abort(found)
                os._exit(1)
            return

    def _read(self) -> PeerFailure | None:
        assert self._store is not None
        if not self._store.check([self._key]):
            return None
        record = json.loads(self._store.get(self._key))
        return PeerFailure(record["rank"], record["reason"], record["signal"])


def _is_broken_collective(error: BaseException) -> bool:
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].partition(". This is typically")[0]


def connect_to_store() -> Store | None:
    """Open a new connection to the rendezvous store; None if the environment does not name it."""
    if (path := os.environ.get("ACCELERATE_DEBUG_RDV_FILE")) is not None:
        # accelerate's debug_launcher also sets an address, at which there is no server. Without a number of ranks, this
        # connection does not remove the file when it closes.
        return FileStore(path)
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=30))
