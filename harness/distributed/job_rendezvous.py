"""Rendezvous of ranks without a given port: rank zero takes a free one, and tells the others which.

    rank zero      keeps the store at a free port; says its number at the first free one of a list of ports
    other ranks    ask at each port of the list, on rank zero's node, until one answers in the name of their job

The list follows from the job's name: no port is chosen on one node for another, two jobs on a node do not meet, and a
port that somebody else has is passed by. The list is no secret, so who answers there, and who asks, must prove that it
knows the job's (`job_secret`, `handshake`) before anything else that it sends is looked at. `harness rank` sets what
this reads: the host, and the job's name.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from harness.distributed import job_secret
from harness.distributed.handshake import AuthenticationError, Handshake
from harness.distributed.meeting import JOB_VARIABLE
from harness.errors import LaunchError

SCHEME = "harness-job"

_NUM_PORTS = 32
# Below those that systems give to clients (32768 and up on Linux).
_PORTS = range(20_000, 32_000)
_ANSWER_S = 2.0
_NUM_AT_ONCE = 32
_PAUSE_S = 0.2


def ports_of(job: str) -> list[int]:
    """The ports that are asked at, in order; the same on every node.

    Args:
        job: a name that no other job has at that time.
    """
    return random.Random(job).sample(_PORTS, _NUM_PORTS)


def serve(job: str, secret: bytes, world_size: int, all_met: Callable[[], None] = lambda: None) -> tuple[Store, int]:
    """Keep the store that the ranks meet at, and tell the job's ranks its port. For rank zero.

    Effects: daemon threads, which answer as long as the process lives; nothing on disk.

    Args:
        job: name of the job.
        secret: of the job.
        world_size: number of ranks.
        all_met: called once each of the other ranks has been answered.

    Returns:
        The store, and its port.

    Raises:
        LaunchError: if none of the job's ports is free.
    """
    listener = _listen(job)
    store = TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False)
    door = _Door(Handshake(secret, job, _ANSWER_S), json.dumps({"port": store.port}).encode(), world_size, all_met)
    threading.Thread(target=door.open, args=(listener,), name="harness-rendezvous", daemon=True).start()
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


class _Door:
    """Answers whoever knows the secret, several at a time: one that is silent must not keep the others waiting."""

    def __init__(self, handshake: Handshake, message: bytes, world_size: int, all_met: Callable[[], None]) -> None:
        self._handshake = handshake
        self._message = message
        self._all_met = all_met
        self._places = threading.Semaphore(_NUM_AT_ONCE)
        # By rank, not by number: one that had no time left to read its answer asks again.
        self._missing = set(range(1, world_size))
        self._lock = threading.Lock()

    def open(self, listener: socket.socket) -> None:
        while True:
            self._places.acquire()
            try:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # no descriptor or thread is free
                self._places.release()
                time.sleep(_PAUSE_S)

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                rank = self._handshake.answer(connection, self._message)
        except OSError:
            return
        finally:
            self._places.release()
        with self._lock:
            is_last = self._missing == {rank}
            self._missing.discard(rank)
        if is_last:
            self._all_met()


def find(job: str, rank: int, host: str, read: Callable[[], bytes | None], timeout: timedelta) -> tuple[Store, int]:
    """A connection to the store that rank zero keeps, and its port.

    Effects: blocks until rank zero has started, at most `timeout`.

    Args:
        job: name of the job.
        rank: of this process.
        host: rank zero's.
        read: gives the job's secret; None: it is not known yet.
        timeout: limit of the wait.

    Raises:
        TimeoutError: with the host and what was found there.
        LaunchError: from `read`.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    secret: bytes | None = None
    while True:
        # Again each time: a file of an earlier start may be replaced, and is removed when all have met.
        secret = read() or secret
        if secret is None:
            reason = "it has not written the job's secret where this rank looks for it"
        else:
            port, reason = _find_port(Handshake(secret, job, _ANSWER_S), rank, host)
            if port is not None:
                return TCPStore(host, port, is_master=False, timeout=timeout), port
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"rank 0 was not found on {host} in time: {reason}")
        time.sleep(_PAUSE_S)


def _find_port(handshake: Handshake, rank: int, host: str) -> tuple[int | None, str]:
    """The store's port, or None with the reason."""
    reason = "no port answers"
    for port in ports_of(handshake.name):
        try:
            # By a socket of our own: torch's store, with somebody else at the other end, waits without a limit
            # (torch 2.13).
            with socket.create_connection((host, port), timeout=_ANSWER_S) as asking:
                message = handshake.ask(asking, rank)
        except socket.gaierror as error:
            return None, f"its name is not known on {socket.gethostname()}: {error.strerror}"
        except TimeoutError:
            reason = f"port {port} does not answer in time"
        except AuthenticationError:
            reason = f"who answers at port {port} does not know the job's secret"
        except OSError:
            continue
        else:
            return int(json.loads(message)["port"]), ""
    return None, reason


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    job, rank, world_size = os.environ[JOB_VARIABLE], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        store, port = serve(job, job_secret.make_secret(), world_size, job_secret.discard)
    else:
        store, port = find(job, rank, os.environ["MASTER_ADDR"], job_secret.read_secret, timeout)
    # For whatever else connects to it (`harness.distributed.failure_monitor`).
    os.environ["MASTER_PORT"] = str(port)
    yield store, rank, world_size


register_rendezvous_handler(SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
