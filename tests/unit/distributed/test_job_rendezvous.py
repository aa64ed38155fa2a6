"""Ranks find one another without a configured port: real sockets, real stores."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from harness.distributed.job_rendezvous import find, ports_of, serve
from harness.distributed.job_secret import AuthenticationError, Handshake, JobSecret
from harness.errors import LaunchError

SOON = timedelta(seconds=20)
SECRET = JobSecret(b"known to the ranks of the job alone")


@pytest.fixture
def job() -> str:
    """A name that no other test of this machine has, so that its ports are others."""
    return f"{os.getpid()}.{os.urandom(4).hex()}"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


@pytest.fixture
def secret_file(tmp_path: Path) -> JobSecret:
    return JobSecret(None, tmp_path / "rendezvous.secret")


def occupy(stack: ExitStack, port: int) -> socket.socket:
    server = stack.enter_context(socket.socket())
    server.bind(("0.0.0.0", port))
    server.listen()
    return server


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_store_is_shared_when_all_ports_are_free(job: str) -> None:
    store, port = serve(job, SECRET, 2)
    other, found = find(job, 1, "127.0.0.1", SECRET, SOON)
    assert port == found
    store.set("key", "by rank 0")
    assert other.get("key") == b"by rank 0"


def test_store_is_found_when_others_have_the_first_ports(job: str, stack: ExitStack) -> None:
    silent, talks, another, words = (occupy(stack, port) for port in ports_of(job)[:4])
    texts = ((talks, b"220 mail ready\n"), (another, b'{"job": "another", "port": 1}\n'), (words, b"[]\n"))
    for server, text in texts:
        threading.Thread(target=send_to_all, args=(server, text), daemon=True).start()
    _, port = serve(job, SECRET, 2)
    assert find(job, 1, "127.0.0.1", SECRET, SOON)[1] == port
    assert silent.fileno() >= 0


def send_to_all(server: socket.socket, text: bytes) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            with client:
                client.sendall(text)


def test_impostor_is_skipped_when_it_has_the_first_port(job: str, stack: ExitStack) -> None:
    """One speaks the protocol, knows the job's name and guesses a secret; one echoes what it receives."""
    guessing, echoing = (occupy(stack, port) for port in ports_of(job)[:2])
    guess = Handshake(b"a guess, as long as the secret is....", job, 2.0)

    def guess_for_all() -> None:
        with suppress(OSError):
            while True:
                client, _ = guessing.accept()
                with client, suppress(OSError):
                    guess.send(client, b'{"port": 1}')

    def echo_to_all() -> None:
        with suppress(OSError):
            while True:
                client, _ = echoing.accept()
                with client, suppress(OSError):
                    while received := client.recv(1000):
                        client.sendall(received * 2)

    for each in (guess_for_all, echo_to_all):
        threading.Thread(target=each, daemon=True).start()
    with pytest.raises(TimeoutError, match="does not know the job's secret"):
        find(job, 1, "127.0.0.1", SECRET, timedelta(seconds=0.1))
    _, port = serve(job, SECRET, 2)
    assert find(job, 1, "127.0.0.1", SECRET, SOON)[1] == port


def test_port_is_not_sent_when_the_client_has_no_secret(job: str, secret_file: JobSecret) -> None:
    store, _ = serve(job, secret_file, 2)
    listening = next(port for port in ports_of(job) if listens(port))
    with socket.create_connection(("127.0.0.1", listening), timeout=5) as client, pytest.raises(AuthenticationError):
        Handshake(b"another secret, as long as it is....", job, 5.0).receive(client, 1)
    with socket.create_connection(("127.0.0.1", listening), timeout=5) as client:
        # A client that skips its check of the server cannot reflect the server's MAC.
        client.sendall(b"n" * 32)
        received = b""
        while len(received) < 64:
            received += client.recv(64 - len(received))
        client.sendall((1).to_bytes(4, "big") + received[32:])
        assert client.recv(1000) == b""
    assert secret_file.path is not None and secret_file.path.exists()
    find(job, 1, "127.0.0.1", secret_file, SOON)
    assert is_removed(secret_file)
    del store


def test_secret_is_removed_when_each_rank_has_its_answer(job: str, secret_file: JobSecret) -> None:
    """A rank that connects again, after a time limit, counts once; so does a rank out of range not at all."""
    store, port = serve(job, secret_file, 4)
    known = JobSecret(secret_file.read())
    for rank in (1, 2, 1, 1, 2, 7):
        assert find(job, rank, "127.0.0.1", known, SOON)[1] == port
    assert not is_removed(secret_file, within_s=0.5)
    find(job, 3, "127.0.0.1", known, SOON)
    assert is_removed(secret_file)
    del store


def is_removed(secret: JobSecret, within_s: float = 5.0) -> bool:
    """Whether the file is removed in time; by a thread of the server."""
    assert secret.path is not None
    pause = threading.Event()
    for _ in range(round(within_s / 0.05)):
        if not secret.path.exists():
            return True
        pause.wait(0.05)
    return False


def test_rank_is_refused_when_it_is_changed_in_transit() -> None:
    ours, theirs = socket.socketpair()
    refused: list[BaseException] = []

    def serve_one() -> None:
        with ours, pytest.raises(AuthenticationError) as caught:
            Handshake(b"known to both", "a", 5.0).send(ours, b"message")
        refused.append(caught.value)

    serving = threading.Thread(target=serve_one)
    serving.start()
    with ChangesRank(theirs) as changing, pytest.raises(AuthenticationError):
        Handshake(b"known to both", "a", 5.0).receive(changing, 1)
    serving.join(10)
    assert len(refused) == 1


class ChangesRank(socket.socket):
    """Sends another rank than it is given."""

    def __init__(self, inner: socket.socket) -> None:
        super().__init__(fileno=inner.detach())

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        """Send it."""
        super().sendall(data if len(data) != 36 else (2).to_bytes(4, "big") + data[4:], flags)


def test_store_is_found_when_the_file_has_an_earlier_starts_secret(job: str, secret_file: JobSecret) -> None:
    assert secret_file.path is not None
    old = secret_file.create()
    found: list[int] = []
    searching = threading.Thread(target=lambda: found.append(find(job, 1, "127.0.0.1", secret_file, SOON)[1]))
    searching.start()
    _, port = serve(job, JobSecret(b"x" * len(old)), 2)
    searching.join(1.0)
    assert found == []
    secret_file.path.write_bytes(b"x" * len(old))
    searching.join(20)
    assert found == [port]


def test_rank_is_answered_when_other_clients_are_silent(job: str, stack: ExitStack) -> None:
    store, port = serve(job, SECRET, 2)
    listening = next(port for port in ports_of(job) if listens(port))
    for _ in range(10):
        stack.enter_context(socket.create_connection(("127.0.0.1", listening), timeout=5))
    assert find(job, 1, "127.0.0.1", SECRET, timedelta(seconds=1))[1] == port
    del store


def test_rank_waits_for_rank_zero_when_it_starts_first(job: str) -> None:
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(find(job, 1, "127.0.0.1", SECRET, SOON)[1]))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    _, port = serve(job, SECRET, 2)
    waiting.join(20)
    assert found == [port]


def test_error_names_host_and_reason_when_rank_zero_is_missing(job: str) -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 was not found on 127\.0\.0\.1 in time: no port answers"):
        find(job, 1, "127.0.0.1", SECRET, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match=r"not found on no-such-host\.invalid in time: its name is not known on"):
        find(job, 1, "no-such-host.invalid", SECRET, timedelta(seconds=0.1))


def test_serve_fails_when_no_port_is_free(job: str, stack: ExitStack) -> None:
    for port in ports_of(job):
        # A port may be in use already, by an earlier test's store.
        with suppress(OSError):
            occupy(stack, port)
    with pytest.raises(LaunchError, match="ports is free on"):
        serve(job, SECRET, 2)


def test_ports_are_below_those_of_clients_and_differ_between_jobs() -> None:
    first, again, other = ports_of("1.0.0"), ports_of("1.0.0"), ports_of("1.0.1")
    assert first == again != other
    assert len(set(first)) == len(first)
    assert all(1024 < port < 32768 for port in first)
