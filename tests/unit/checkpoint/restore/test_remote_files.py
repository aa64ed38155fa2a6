from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from harness.checkpoint.format.files import LocalFiles, OpenFile
from harness.checkpoint.restore.remote_files import WINDOW_BYTES, _Link, _SentFiles, _ServedFiles
from harness.errors import CheckpointError, DamagedError

NAMES = ["a", "b", "missing"]


@pytest.fixture
def groups() -> Iterator[list[dist.ProcessGroup]]:
    """Three real gloo endpoints in three threads."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        made = [
            threads.submit(dist.ProcessGroupGloo, store, rank, 3, timedelta(seconds=30))  # type: ignore[attr-defined]
            for rank in range(3)
        ]
        found = [group.result(timeout=60) for group in made]
    del made  # a test closes one of them
    yield found


def sent(groups: list[dist.ProcessGroup], rank: int, timeout_s: float = 30.0) -> _SentFiles:
    return _SentFiles(Path("nowhere"), NAMES, [0], 0, _Link(groups[rank], timeout_s))


def served(
    groups: list[dist.ProcessGroup], directory: Path, clients: list[int], timeout_s: float = 30.0
) -> _ServedFiles:
    return _ServedFiles(directory, NAMES, [0], clients, _Link(groups[0], timeout_s))


def read(files: _SentFiles, name: str, start: int, end: int, step: int) -> bytes:
    """Bytes of a file, so many at a time."""
    found = b""
    with files.opened(name) as file:
        for at in range(start, end, step):
            part = bytearray(min(step, end - at))
            file.fill(memoryview(part), at, end)
            found += part
    return found


def test_bytes_are_those_of_the_file_when_another_rank_sends_them(
    tmp_path: Path, groups: list[dist.ProcessGroup]
) -> None:
    content = os.urandom(2 * WINDOW_BYTES + 12_345)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"xyz")

    def first() -> list[bytes]:
        files = sent(groups, 1)
        return files.reading(lambda: [read(files, "a", 0, len(content), 512 << 10), read(files, "a", 7, 8, 1)])

    def second() -> tuple[bytes, int]:
        files = sent(groups, 2)

        def run() -> tuple[bytes, int]:
            with files.opened("b") as file:
                return read(files, "b", 1, 3, 1), file.size_bytes()

        return files.reading(run)

    with ThreadPoolExecutor(2) as threads:
        clients = threads.submit(first), threads.submit(second)
        assert served(groups, tmp_path, [1, 2]).reading(lambda: "its own") == "its own"
        assert clients[0].result(timeout=30) == [content, content[7:8]]
        assert clients[1].result(timeout=30) == (b"yz", 3)


class Unreadable(LocalFiles):
    """A disk in trouble."""

    @contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        raise CheckpointError(f"{name}: cannot be read: Input/output error")
        yield


class UnreadableServed(_ServedFiles, Unreadable):
    """The same, for others too."""


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("missing", DamagedError, "from rank 0: .*missing: No such file or directory; use another checkpoint"),
        ("b", DamagedError, "from rank 0: .*b: ends at byte 3; use another checkpoint"),
        ("strange", DamagedError, "nowhere/strange: rank 0 has no such file"),
        ("a", CheckpointError, "from rank 0: a: cannot be read: Input/output error"),
    ],
)
def test_error_is_the_senders_when_it_cannot_read(
    tmp_path: Path, groups: list[dist.ProcessGroup], name: str, kind: type[Exception], said: str
) -> None:
    (tmp_path / "b").write_bytes(b"xyz")
    cls = UnreadableServed if name == "a" else _ServedFiles
    server = cls(tmp_path, NAMES, [0], [1], _Link(groups[0], 30.0))
    files = sent(groups, 1)
    with ThreadPoolExecutor(1) as thread:
        client = thread.submit(files.reading, lambda: read(files, name, 0, 5, 5))
        assert server.reading(lambda: 1) == 1  # what it sends is no matter of its own
        with pytest.raises(kind, match=said) as caught:
            client.result(timeout=30)
    assert type(caught.value) is kind


def test_others_are_served_when_one_is_gone(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    (tmp_path / "b").write_bytes(b"xyz")
    server, files = served(groups, tmp_path, [1, 2]), sent(groups, 2)
    del groups[1]
    gc.collect()
    with ThreadPoolExecutor(1) as thread:
        client = thread.submit(files.reading, lambda: read(files, "b", 0, 3, 1))
        with pytest.raises(CheckpointError, match="waited for rank 1 to request bytes of the checkpoint: "):
            server.reading(lambda: 1)
        assert client.result(timeout=30) == b"xyz"


def test_error_names_the_rank_when_it_does_not_ask(tmp_path: Path, groups: list[dist.ProcessGroup]) -> None:
    with pytest.raises(CheckpointError, match="waited for rank 1 to request bytes of the checkpoint: "):
        served(groups, tmp_path, [1], timeout_s=0.2).reading(lambda: 1)


def test_error_names_the_sender_when_it_does_not_answer(groups: list[dist.ProcessGroup]) -> None:
    files = sent(groups, 1, timeout_s=0.2)
    with pytest.raises(CheckpointError, match=r"waited for rank 0 to (receive a request for|send) bytes of "):
        files.reading(lambda: read(files, "b", 0, 3, 1))
