"""Connect the ranks of a job without a configured port: rank 0 publishes the port of its store.

    rank 0        hosts a TCPStore at a free port; a port server at the first free port of a list publishes its number
    other ranks   try each port of the list on rank 0's host until a port server of their job answers

The list is derived from the job's name, so all nodes have the same one, and two jobs on a host different ones. Ports in
use are skipped. The list is not secret, so server and client authenticate each other with the job's secret
(`harness.distributed.job_secret`). `harness rank` sets the variables that this module reads.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from harness.distributed.job_secret import JOB_VARIABLE, AuthenticationError, Handshake, JobSecret
from harness.errors import LaunchError

SCHEME = "harness-job"

_NUM_PORTS = 32
# Below the ephemeral ports of clients (32768 and up on Linux).
_PORTS = range(20_000, 32_000)
_HANDSHAKE_S = 2.0
_MAX_CONNECTIONS = 32
_RETRY_S = 0.2


def ports_of(job: str) -> list[int]:
    """Return the ports to try, in order; the same on every node, and different for each job."""
    return random.Random(job).sample(_PORTS, _NUM_PORTS)


def serve(job: str, secret: JobSecret, world_size: int) -> tuple[Store, int]:
    """Create the store on rank 0, publish its port to the job's other ranks, and return both.

    Effects: starts daemon threads that answer until the process ends; leaves the file of the secret until every other
    rank has its answer.

    Raises:
        LaunchError: if none of the job's ports is free, or the secret cannot be written.
    """
    value = secret.create()
    listener = _listen(job)
    store = TCPStore("0.0.0.0", 0, world_size, is_master=True, wait_for_workers=False)
    message = json.dumps({"port": store.port}).encode()
    server = _PortServer(listener, Handshake(value, job, _HANDSHAKE_S), message, world_size, secret)
    threading.Thread(target=server.run, name="harness-rendezvous", daemon=True).start()
    return store, store.port


def _listen(job: str) -> socket.socket:
    for port in ports_of(job):
        listener = socket.socket()
        try:
            listener.bind(("0.0.0.0", port))
            listener.listen(128)
            return listener
        except OSError:  # in use
            listener.close()
    raise LaunchError(f"none of {_NUM_PORTS} ports is free on {socket.gethostname()}: {ports_of(job)}")


class _PortServer:
    """Sends a message to each authenticated client, concurrently, so that a silent one does not delay the others."""

    def __init__(
        self, listener: socket.socket, handshake: Handshake, message: bytes, world_size: int, secret: JobSecret
    ) -> None:
        self._listener = listener
        self._handshake = handshake
        self._message = message
        self._secret = secret
        self._connections = threading.Semaphore(_MAX_CONNECTIONS)
        # A set of ranks, not a count, because a rank that times out before it reads its answer connects again.
        self._missing = set(range(1, world_size))
        self._lock = threading.Lock()

    def run(self) -> None:
        while True:
            self._connections.acquire()
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # no descriptor or thread is free
                self._connections.release()
                time.sleep(_RETRY_S)

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                rank = self._handshake.send(connection, self._message)
        except OSError:
            return
        finally:
            self._connections.release()
        with self._lock:
            is_last = self._missing == {rank}
            self._missing.discard(rank)
        if is_last:
            self._secret.discard()


def find(job: str, rank: int, host: str, secret: JobSecret, timeout: timedelta) -> tuple[Store, int]:
    """Connect to the store of rank 0 on `host` and return it with its port.

    Effects: blocks until rank 0 has started, at most `timeout`.

    Raises:
        TimeoutError: if rank 0 is not found in time; with the host and the reason.
        LaunchError: if the secret cannot be read.
    """
    deadline_s = time.monotonic() + timeout.total_seconds()
    value: bytes | None = None
    while True:
        # Read each time, because rank 0 may replace the file of an earlier start, and removes it when all have joined.
        value = secret.read() or value
        if value is None:
            reason = "it has not written the job's secret where this rank looks for it"
        else:
            port, reason = _find_port(Handshake(value, job, _HANDSHAKE_S), rank, host)
            if port is not None:
                return TCPStore(host, port, is_master=False, timeout=timeout), port
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"rank 0 was not found on {host} in time: {reason}")
        time.sleep(_RETRY_S)


def _find_port(handshake: Handshake, rank: int, host: str) -> tuple[int | None, str]:
    """Return the store's port, or None and the reason."""
    reason = "no port answers"
    for port in ports_of(handshake.job):
        try:
            # A TCPStore that is connected to another program blocks without a limit (torch 2.13).
            with socket.create_connection((host, port), timeout=_HANDSHAKE_S) as connection:
                message = handshake.receive(connection, rank)
        except socket.gaierror as error:
            return None, f"its name is not known on {socket.gethostname()}: {error.strerror}"
        except TimeoutError:
            reason = f"port {port} does not answer in time"
        except AuthenticationError:
            reason = f"the server at port {port} does not know the job's secret"
        except OSError:
            continue
        else:
            return int(json.loads(message)["port"]), ""
    return None, reason


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=30), **_: Any) -> Iterator[tuple[Store, int, int]]:
    job, rank, world_size = os.environ[JOB_VARIABLE], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    secret = JobSecret.from_environment()
    if rank == 0:
        store, port = serve(job, secret, world_size)
    else:
        store, port = find(job, rank, os.environ["MASTER_ADDR"], secret, timeout)
    # For other connections to the store (`harness.distributed.failure_monitor`).
    os.environ["MASTER_PORT"] = str(port)
    yield store, rank, world_size


register_rendezvous_handler(SCHEME, _rendezvous)  # type: ignore[no-untyped-call]
