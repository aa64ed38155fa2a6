"""Ranks meet at a port that nobody has chosen for them: real sockets, real stores."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from harness.distributed.handshake import AuthenticationError, Handshake
from harness.distributed.job_rendezvous import find, ports_of, serve
from harness.errors import LaunchError

SOON = timedelta(seconds=20)
SECRET = b"known to the ranks of the job alone"


def known() -> bytes:
    return SECRET


@pytest.fixture
def job() -> str:
    """A name that no other test of this machine has, so that its ports are others."""
    return f"{os.getpid()}.{os.urandom(4).hex()}"


@pytest.fixture
def taken() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def take(stack: ExitStack, port: int) -> socket.socket:
    server = stack.enter_context(socket.socket())
    server.bind(("0.0.0.0", port))
    server.listen()
    return server


def test_ranks_meet_when_nobody_is_in_their_way(job: str) -> None:
    store, port = serve(job, SECRET, 2)
    other, found = find(job, 1, "127.0.0.1", known, SOON)
    assert port == found
    store.set("said", "by rank 0")
    assert other.get("said") == b"by rank 0"


def test_ranks_meet_all_the_same_when_others_have_the_first_ports(job: str, taken: ExitStack) -> None:
    silent, talks, another, words = (take(taken, port) for port in ports_of(job)[:4])
    for server, said in ((talks, b"220 mail ready\n"), (another, b'{"job": "another", "port": 1}\n'), (words, b"[]\n")):
        threading.Thread(target=say_to_all, args=(server, said), daemon=True).start()
    _, port = serve(job, SECRET, 2)
    assert find(job, 1, "127.0.0.1", known, SOON)[1] == port
    assert silent.fileno() >= 0


def say_to_all(server: socket.socket, said: bytes) -> None:
    with suppress(OSError):
        while True:
            asking, _ = server.accept()
            with asking:
                asking.sendall(said)


def test_stranger_is_passed_by_when_it_has_the_jobs_first_port(job: str, taken: ExitStack) -> None:
    """One that speaks the protocol, knows the job's name, and guesses a secret; and one that only repeats."""
    guessing, repeating = (take(taken, port) for port in ports_of(job)[:2])
    guess = Handshake(b"a guess, as long as the secret is....", job, 2.0)

    def guess_for_all() -> None:
        with suppress(OSError):
            while True:
                asking, _ = guessing.accept()
                with asking, suppress(OSError):
                    guess.answer(asking, b'{"port": 1}')

    def repeat_to_all() -> None:
        with suppress(OSError):
            while True:
                asking, _ = repeating.accept()
                with asking, suppress(OSError):
                    while received := asking.recv(1000):
                        asking.sendall(received * 2)

    for each in (guess_for_all, repeat_to_all):
        threading.Thread(target=each, daemon=True).start()
    with pytest.raises(TimeoutError, match="does not know the job's secret"):
        find(job, 1, "127.0.0.1", known, timedelta(seconds=0.1))
    _, port = serve(job, SECRET, 2)
    assert find(job, 1, "127.0.0.1", known, SOON)[1] == port


def test_port_of_the_store_is_not_told_when_the_asking_rank_has_no_secret(job: str) -> None:
    met = threading.Event()
    store, _ = serve(job, SECRET, 2, met.set)
    door = next(port for port in ports_of(job) if answers(port))
    with socket.create_connection(("127.0.0.1", door), timeout=5) as asking, pytest.raises(AuthenticationError):
        Handshake(b"another secret, as long as it is....", job, 5.0).ask(asking, 1)
    with socket.create_connection(("127.0.0.1", door), timeout=5) as asking:
        # Whoever skips the check of the server must still prove that it knows the secret itself: not by reflection.
        asking.sendall(b"n" * 32)
        said = b""
        while len(said) < 64:
            said += asking.recv(64 - len(said))
        asking.sendall((1).to_bytes(4, "big") + said[32:])
        assert asking.recv(1000) == b""
    assert not met.is_set()
    find(job, 1, "127.0.0.1", known, SOON)
    assert met.wait(5)
    del store


def test_all_have_met_when_each_rank_was_answered_however_often_one_asks(job: str) -> None:
    """One that has no time left to read its answer asks again."""
    met = threading.Event()
    store, port = serve(job, SECRET, 4, met.set)
    for rank in (1, 2, 1, 1, 2, 7):
        assert find(job, rank, "127.0.0.1", known, SOON)[1] == port
    assert not met.wait(0.5)
    find(job, 3, "127.0.0.1", known, SOON)
    assert met.wait(5)
    del store


def test_rank_of_the_client_is_refused_when_it_was_changed_on_the_way() -> None:
    ours, theirs = socket.socketpair()
    refused: list[BaseException] = []

    def answer() -> None:
        with ours, pytest.raises(AuthenticationError) as caught:
            Handshake(SECRET, "a", 5.0).answer(ours, b"message")
        refused.append(caught.value)

    answering = threading.Thread(target=answer)
    answering.start()
    with Changing(theirs) as changing, pytest.raises(AuthenticationError):
        Handshake(SECRET, "a", 5.0).ask(changing, 1)
    answering.join(10)
    assert len(refused) == 1


class Changing(socket.socket):
    """Sends another rank than it is given."""

    def __init__(self, inner: socket.socket) -> None:
        super().__init__(fileno=inner.detach())

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send it."""
        super().sendall(data if len(data) != 36 else (2).to_bytes(4, "big") + data[4:], flags)


def test_rank_meets_all_the_same_when_it_has_read_the_secret_of_an_earlier_start(job: str, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"of an earlier start, which has left it there")
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(find(job, 1, "127.0.0.1", path.read_bytes, SOON)[1]))
    asking.start()
    _, port = serve(job, SECRET, 2)
    asking.join(1.0)
    assert found == []
    path.write_bytes(SECRET)
    asking.join(20)
    assert found == [port]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_rank_is_answered_when_others_connect_and_are_silent(job: str, taken: ExitStack) -> None:
    store, port = serve(job, SECRET, 2)
    door = next(port for port in ports_of(job) if answers(port))
    for _ in range(10):
        taken.enter_context(socket.create_connection(("127.0.0.1", door), timeout=5))
    assert find(job, 1, "127.0.0.1", known, timedelta(seconds=1))[1] == port
    del store


def test_rank_waits_for_rank_zero_when_it_starts_first(job: str) -> None:
    found: list[int] = []
    waiting = threading.Thread(target=lambda: found.append(find(job, 1, "127.0.0.1", known, SOON)[1]))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    _, port = serve(job, SECRET, 2)
    waiting.join(20)
    assert found == [port]


def test_error_names_host_and_reason_when_rank_zero_does_not_come(job: str) -> None:
    with pytest.raises(TimeoutError, match=r"rank 0 was not found on 127\.0\.0\.1 in time: no port answers"):
        find(job, 1, "127.0.0.1", known, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match=r"not found on no-such-host\.invalid in time: its name is not known on"):
        find(job, 1, "no-such-host.invalid", known, timedelta(seconds=0.1))


def test_error_is_told_when_no_port_is_free(job: str, taken: ExitStack) -> None:
    for port in ports_of(job):
        # One that somebody else has is taken as well: an earlier test's store, whose process lives on.
        with suppress(OSError):
            take(taken, port)
    with pytest.raises(LaunchError, match="ports is free on"):
        serve(job, SECRET, 2)


def test_ports_are_below_those_of_clients_and_differ_between_jobs() -> None:
    first, again, other = ports_of("1.0.0"), ports_of("1.0.0"), ports_of("1.0.1")
    assert first == again != other
    assert len(set(first)) == len(first)
    assert all(1024 < port < 32768 for port in first)
