"""Connect ranks that torch's elastic agent starts, or restarts after a failure.

The agents keep their store over restarts of the ranks (static rendezvous, which `accelerate launch` uses, and c10d),
including the addresses of the previous ranks. Gloo uses such a stale address and fails to connect (seen with torch
2.13). Each start therefore uses its own prefix in the store. The prefix is not the restart count, which differs between
nodes, because only the node whose rank failed increments it.

    rank 0        publishes a new name       waits for a token of every rank    publishes the list of tokens
    other ranks   write a token under it     wait for a list with their token   start over if the name changes

A token is new in each process, so a list of an earlier start is not mistaken for one of this start.
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
from harness.distributed.job_secret import JOB_VARIABLE
from harness.distributed.launch_identity import Rendezvous, record_rendezvous

_SCHEME = "harness"
_NAME = "harness/rendezvous"
_COUNT = "harness/num_rendezvous"
_POLL_S = 0.02


def init_method() -> str | None:
    """Return the `init_method` for `torch.distributed.init_process_group`; None for torch's default."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"{_SCHEME}://"
    return f"{job_rendezvous.SCHEME}://" if JOB_VARIABLE in os.environ else None


def join(store: Store, rank: int, world_size: int, timeout: timedelta) -> Rendezvous:
    """Agree on the name of this start with all other ranks, through the elastic agent's store.

    Effects: collective, but needs no process group; blocks until all ranks have called it, at most `timeout`.

    Raises:
        TimeoutError: if not all ranks have joined in time; on rank 0 with the missing ones.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        return _lead(store, world_size, deadline_s)
    return _follow(store, rank, deadline_s)


def _lead(store: Store, world_size: int, deadline_s: float) -> Rendezvous:
    name = uuid.uuid4().hex
    rendezvous = Rendezvous(name, store.add(_COUNT, 1) > 1)
    store.set(_NAME, json.dumps([name, rendezvous.is_restart]))
    missing = set(range(1, world_size))
    tokens: dict[int, str] = {}
    while missing:
        for rank in sorted(missing):
            if store.check([_token(name, rank)]):
                tokens[rank] = store.get(_token(name, rank)).decode()
        missing -= tokens.keys()
        if missing:
            _wait(deadline_s, f"ranks {sorted(missing)} to start")
    store.set(_token_list(name), json.dumps(sorted(tokens.values())))
    return rendezvous


def _follow(store: Store, rank: int, deadline_s: float) -> Rendezvous:
    token, name = uuid.uuid4().hex, ""
    while True:
        if store.check([_NAME]):
            latest, is_restart = json.loads(store.get(_NAME))
            if latest != name:
                name = latest
                store.set(_token(name, rank), token)
            if store.check([_token_list(name)]) and token in json.loads(store.get(_token_list(name))):
                return Rendezvous(name, is_restart)
        _wait(deadline_s, "rank 0, or all other ranks, to start")


def _wait(deadline_s: float, what: str) -> None:
    if time.monotonic() > deadline_s:
        raise TimeoutError(f"the rendezvous exceeded its time limit: waited for {what}")
    time.sleep(_POLL_S)


def _token(name: str, rank: int) -> str:
    return f"harness/{name}/token/{rank}"


def _token_list(name: str) -> str:
    return f"harness/{name}/tokens"


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    rendezvous = join(store, rank, world_size, timeout)
    record_rendezvous(rendezvous)
    yield PrefixStore(f"harness/{rendezvous.name}", store), rank, world_size


register_rendezvous_handler(_SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
