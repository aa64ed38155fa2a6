"""Where the ranks meet after a launcher has started them again.

torch's agent keeps its store from one start of the ranks to the next (static rendezvous, which
`accelerate launch` uses), and with it the addresses that the ranks of the start before have left there. Gloo
takes such an address for the other rank's, and fails to connect (seen with torch 2.13). So each start but the
first meets under a name of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME = "harness"


def init_method() -> str | None:
    """What `torch.distributed.init_process_group` is to be given; None: what it does by itself is right."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or _restart() == "0":
        return None
    return f"{_SCHEME}://"


def _restart() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _meet(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    yield PrefixStore(f"harness/restart-{_restart()}", store), rank, world_size


register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]
