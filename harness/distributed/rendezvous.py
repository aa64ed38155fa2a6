"""Where the ranks meet that torch's elastic agent has started, for the first time or again.

The agents keep their store from one start of the ranks to the next (static rendezvous, which `accelerate launch`
uses, and c10d), and with it the addresses that the ranks of the start before have left there. Gloo takes such
an address for the other rank's, and fails to connect (seen with torch 2.13). So each start meets under a name of
its own. The count of restarts is none: it differs between nodes, as only the node whose rank has failed counts.

    rank zero      makes a name, and says it        waits for every rank's greeting   answers with all greetings
    other ranks    greet under the name they read   wait for an answer to their own   read the name again if it changed

A greeting is new in each process, so an answer of an earlier start is told from one of this.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from harness.distributed import job_rendezvous
from harness.distributed.meeting import JOB_VARIABLE, Meeting, have_met

_SCHEME = "harness"
_NAME = "harness/meeting"
_NUMBER = "harness/num_meetings"
_POLL_S = 0.02


def init_method() -> str | None:
    """What `torch.distributed.init_process_group` is to be given; None: what it does by itself is right."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{_SCHEME}://"
    return f"{job_rendezvous.SCHEME}://" if JOB_VARIABLE in os.environ else None


def meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> Meeting:
    """Find the name that all ranks of this start meet under.

    Effects: every rank calls it, before there are collectives; blocks until all have, at most `timeout`.

    Args:
        store: that the launch keeps.
        rank: this rank.
        world_size: number of ranks.
        timeout: limit of the wait.

    Raises:
        TimeoutError: with the ranks that have not come.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _receive(store, world_size, deadline_s)
    return _join(store, rank, deadline_s)


def _receive(store: Store, world_size: int, deadline_s: float) -> Meeting:
    name = uuid.uuid4().hex
    meeting = Meeting(name, store.add(_NUMBER, 1) > 1)
    store.set(_NAME, json.dumps([name, meeting.is_restart]))
    missing = set(range(1, world_size))
    greetings: dict[int, str] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([_greeting(name, rank)]):
                greetings[rank] = store.get(_greeting(name, rank)).decode()
        missing -= greetings.keys()
        if missing:
            _wait(deadline_s, f"ranks {sorted(missing)} to start")
    store.set(_answer(name), json.dumps(sorted(greetings.values())))
    return meeting


def _join(store: Store, rank: int, deadline_s: float) -> Meeting:
    own, name = uuid.uuid4().hex, ""
    while True:
        if store.check([_NAME]):
            said, is_restart = json.loads(store.get(_NAME))
            if said != name:
                name = said
                store.set(_greeting(name, rank), own)
            if store.check([_answer(name)]) and own in json.loads(store.get(_answer(name))):
                return Meeting(name, is_restart)
        _wait(deadline_s, "rank 0, or all other ranks, to start")


def _wait(deadline_s: float, what: str) -> None:
    if time.monotonic() > deadline_s:
        raise TimeoutError(f"the ranks have not met in time: waited for {what}")
    time.sleep(_POLL_S)


def _greeting(name: str, rank: int) -> str:
    return f"harness/{name}/greeting/{rank}"


def _answer(name: str) -> str:
    return f"harness/{name}/answer"


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    meeting = meet(store, rank, world_size, timeout)
    have_met(meeting)
    yield PrefixStore(f"harness/{meeting.name}", store), rank, world_size


register_rendezvous_handler(_SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
