"""Where ranks meet whom nobody has given a port: rank zero takes any that is free, and says which to those who ask.

    rank zero      keeps the store at a free port; says its number at the first free one of a list of ports
    other ranks    ask at each port of the list, on rank zero's node, until one answers in the name of their job

The list follows from the job's name: no port is chosen on one node for another, two jobs on a node do not meet, and a
port that somebody else has is passed by. `harness rank` sets what this reads: the host, and the job's name.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from harness.errors import LaunchError
from harness.meeting import JOB_VARIABLE

SCHEME = "harness-job"

_NUM_PORTS = 32
# Below those that systems give to clients (32768 and up on Linux).
_PORTS = range(20_000, 32_000)
_ANSWER_S = 2.0
_MAX_ANSWER_BYTES = 1000
_PAUSE_S = 0.2


def ports_of(job: str) -> list[int]:
    """The ports that are asked at, in order; the same on every node.

    Args:
        job: a name that no other job has at that time.
    """
    return random.Random(job).sample(_PORTS, _NUM_PORTS)


def serve(job: str, world_size: int) -> tuple[Store, int]:
    """Keep the store that the ranks meet at, and tell who asks; returns it and its port. Rank zero's.

    Effects: a daemon thread, which answers as long as the process lives; nothing on disk.

    Raises:
        LaunchError: if none of the job's ports is free.
    """
    listener = _listen(job)
    store = TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False)
    answer = json.dumps({"job": job, "port": store.port}).encode() + b"\n"
    threading.Thread(target=_answer, args=(listener, answer), name="harness-rendezvous", daemon=True).start()
    return store, store.port


def _listen(job: str) -> socket.socket:
    for port in ports_of(job):
        listener = socket.socket()
        try:
            listener.bind(("0.0.0.0", port))
            listener.listen(128)
            return listener
        except OSError:  # taken
            listener.close()
    raise LaunchError(f"none of {_NUM_PORTS} ports is free on {socket.gethostname()}: {ports_of(job)}")


def _answer(listener: socket.socket, answer: bytes) -> None:
    while True:
        with suppress(OSError):
            asking, _ = listener.accept()
            with asking:
                asking.settimeout(_ANSWER_S)
                asking.sendall(answer)


def find(job: str, host: str, timeout: timedelta) -> tuple[Store, int]:
    """A connection to the store that rank zero keeps, and its port.

    Effects: blocks until rank zero has started, at most `timeout`.

    Raises:
        TimeoutError: with the host and what was found there.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    while True:
        reason = "no port answers"
        for port in ports_of(job):
            try:
                said = _ask(host, port)
            except socket.gaierror as error:
                reason = f"its name is not known on {socket.gethostname()}: {error.strerror}"
                break
            except TimeoutError:
                reason = f"port {port} does not answer in time"
            except OSError:
                continue
            else:
                if said.get("job") == job:
                    return TCPStore(host, int(said["port"]), is_master=False, timeout=timeout), int(said["port"])
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"rank 0 was not found on {host} in time: {reason}")
        time.sleep(_PAUSE_S)


def _ask(host: str, port: int) -> dict[str, Any]:
    """What is said at a port; empty where that is not ours to understand.

    By a socket of our own: torch's store, with somebody else at the other end, waits without a limit (torch 2.13).
    """
    with socket.create_connection((host, port), timeout=_ANSWER_S) as asking:
        said = asking.makefile("rb").readline(_MAX_ANSWER_BYTES)
    try:
        record = json.loads(said)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    job, rank, world_size = os.environ[JOB_VARIABLE], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, port = serve(job, world_size) if rank == 0 else find(job, os.environ["MASTER_ADDR"], timeout)
    # For whatever else connects to it (`harness.peers`).
    os.environ["MASTER_PORT"] = str(port)
    yield store, rank, world_size


register_rendezvous_handler(SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
