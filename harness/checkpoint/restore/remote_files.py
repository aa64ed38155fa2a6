"""Files for ranks that do not see them: a rank that does reads the requested bytes and sends them.

    blind rank   (file, first byte, how many)  ->
                                               <-  status, and the bytes or the error
                 done                          ->

It uses a gloo group of its own, from the main thread of both ranks, 16 MiB at a time, which bounds the memory of both.
Ranks that see the files serve the blind ones first, each of them some, and read for themselves afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harness.checkpoint.format.files import Files, LocalFiles, OpenFile
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError, DamagedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

WINDOW_BYTES = 16 << 20
# A request: number of the file, first byte, number of bytes.
_REQUEST_NUMBERS = 3
_DONE = -1
# As a first byte: request the length of the file.
_LENGTH = -1
_LENGTH_BYTES = 8
# An answer: status, and the number of bytes that follow, of the file or of an error text.
_ANSWER_NUMBERS = 2
_OK, _DAMAGED, _FAILED = range(3)


class RemoteFiles:
    """Provides files that some ranks read from others.

    Effects: none before the first call of `files`, which needs a blind rank.

    Args:
        collectives: of all ranks.
        timeout_s: limit for one request, in seconds; the limit for an answer is twice as long, because other ranks
            may be served first.
    """

    def __init__(self, collectives: Collectives, timeout_s: float = 300.0) -> None:
        self._collectives = collectives
        self._timeout_s = timeout_s
        self._group: ProcessGroup | None = None

    def files(self, directory: Path, names: Sequence[str], blind: Sequence[int]) -> Files:
        """Return the files of a directory, for every rank.

        Effects: collective (creates a group at the first call); main thread; nothing on disk. What is read between
        the calls of `reading` blocks on other ranks as said above.

        Args:
            directory: as each rank calls it.
            names: of the files, the same on every rank.
            blind: the ranks that do not see them; at least one, and not rank zero.
        """
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        rank, world_size = self._collectives.rank, self._collectives.world_size
        readers = [other for other in range(world_size) if other not in set(blind)]
        link = _Link(self._group, self._timeout_s)
        if rank in readers:
            # Neighbouring ranks share a node, so each reader serves some ranks of every other node.
            clients = blind[readers.index(rank) :: len(readers)]
            return _ServedFiles(directory, names, readers, clients, link)
        return _SentFiles(directory, names, readers, readers[list(blind).index(rank) % len(readers)], link)


class _Link:
    """Messages to and from other ranks, each with a time limit and a name."""

    def __init__(self, group: ProcessGroup, timeout_s: float) -> None:
        self._group = group
        self.timeout_s = timeout_s

    def send(self, rank: int, content: Tensor, what: str) -> None:
        self._await(lambda: self._group.send([content], rank, 0), f"rank {rank} to {what}", self.timeout_s)

    def receive(self, rank: int, content: Tensor, what: str, timeout_s: float) -> Tensor:
        self._await(lambda: self._group.recv([content], rank, 0), f"rank {rank} to {what}", timeout_s)
        return content

    def _await(self, begin: Callable[[], Any], what: str, timeout_s: float) -> None:
        try:
            begin().wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise CheckpointError(f"waited for {what}: {str(error).splitlines()[0]}") from error


class _ServedFiles(LocalFiles):
    """Files that this rank reads, for itself and for others."""

    def __init__(
        self, directory: Path, names: Sequence[str], readers: Sequence[int], clients: Sequence[int], link: _Link
    ) -> None:
        super().__init__(directory)
        self.readers = readers
        self._names = names
        self._clients = clients
        self._link = link

    def reading(self, run: Callable[[], T]) -> T:
        # First, because they wait.
        self._serve()
        return run()

    def _serve(self) -> None:
        """Answer requests until every client is done or gone.

        Raises:
            CheckpointError: if a client is gone, once the others are served; or sends no request in time, after which
                gloo closes every connection of this rank.
        """
        if not self._clients:
            return
        failures: list[CheckpointError] = []
        waiting = list(self._clients)
        window = torch.empty(WINDOW_BYTES, dtype=torch.uint8)
        with ExitStack() as stack:
            files: dict[int, OpenFile] = {}
            while waiting:
                for client in list(waiting):
                    try:
                        request = torch.empty(_REQUEST_NUMBERS, dtype=torch.int64)
                        what = "request bytes of the checkpoint"
                        number, start, size = self._link.receive(client, request, what, self._link.timeout_s).tolist()
                        if number == _DONE:
                            waiting.remove(client)
                            continue
                        if number not in files:
                            files[number] = _LazyFile(stack, self, self._names[number])
                        self._answer(client, *_read(files[number], start, window[:size]))
                    except CheckpointError as error:
                        waiting.remove(client)
                        failures.append(error)
        if failures:
            raise failures[0]

    def _answer(self, client: int, status: int, content: Tensor) -> None:
        what = "receive a part of the checkpoint"
        self._link.send(client, torch.tensor([status, content.numel()]), what)
        self._link.send(client, content, what)


def _read(file: OpenFile, start: int, window: Tensor) -> tuple[int, Tensor]:
    """Return the status and the content of an answer."""
    try:
        if start == _LENGTH:
            return _OK, torch.tensor([file.size_bytes()]).view(torch.uint8)
        file.fill(memoryview(window.numpy()), start, start + window.numel())  # type: ignore[arg-type]
        return _OK, window
    except Exception as error:
        status = _DAMAGED if isinstance(error, DamagedError) else _FAILED
        return status, torch.frombuffer(bytearray(str(error).encode() or b"?"), dtype=torch.uint8)


class _LazyFile:
    """A file that is opened at its first read, so that a failure is sent to the rank that reads."""

    def __init__(self, stack: ExitStack, files: LocalFiles, name: str) -> None:
        self._stack = stack
        self._files = files
        self._name = name
        self._file: OpenFile | None = None

    def _open(self) -> OpenFile:
        self._file = self._file or self._stack.enter_context(self._files.opened(self._name))
        return self._file

    def size_bytes(self) -> int:
        return self._open().size_bytes()

    def fill(self, part: memoryview, start: int, end: int) -> None:
        self._open().fill(part, start, end)


class _SentFiles:
    """Files whose bytes another rank sends."""

    def __init__(self, directory: Path, names: Sequence[str], readers: Sequence[int], server: int, link: _Link) -> None:
        self.directory = directory
        self.readers: Sequence[int] | None = readers
        self._names = names
        self._server = server
        self._link = link

    @contextmanager
    def opened(self, name: str) -> Iterator[OpenFile]:
        if name not in self._names:
            raise DamagedError(f"{self.directory / name}: rank {self._server} has no such file; use another checkpoint")
        yield _SentFile(self, self._names.index(name))

    def reading(self, run: Callable[[], T]) -> T:
        try:
            return run()
        finally:
            # If this cannot be sent, the connection is closed, and the server knows that.
            with suppress(CheckpointError):
                self._request(_DONE, 0, 0)

    def receive_into(self, number: int, start: int, content: Tensor) -> None:
        """Receive bytes of a file into `content`.

        Raises:
            DamagedError, CheckpointError: the failure of the server, or that it is gone.
        """
        self._request(number, start, content.numel())
        answer = torch.empty(_ANSWER_NUMBERS, dtype=torch.int64)
        status, size = self._receive(answer).tolist()
        if status == _OK:
            self._receive(content)
            return
        text = bytes(self._receive(torch.empty(size, dtype=torch.uint8)).numpy()).decode()
        raise (DamagedError if status == _DAMAGED else CheckpointError)(f"from rank {self._server}: {text}")

    def _request(self, number: int, start: int, size: int) -> None:
        request = torch.tensor([number, start, size])
        self._link.send(self._server, request, "receive a request for bytes of the checkpoint")

    def _receive(self, content: Tensor) -> Tensor:
        return self._link.receive(self._server, content, f"send bytes of {self.directory}", 2 * self._link.timeout_s)


class _SentFile:
    def __init__(self, files: _SentFiles, number: int) -> None:
        self._files = files
        self._number = number
        self._window = torch.empty(0, dtype=torch.uint8)
        # Bytes of the file that the window holds.
        self._begin = self._end = 0

    def size_bytes(self) -> int:
        length = torch.empty(_LENGTH_BYTES, dtype=torch.uint8)
        self._files.receive_into(self._number, _LENGTH, length)
        return int(length.view(torch.int64).item())

    def fill(self, part: memoryview, start: int, end: int) -> None:
        position = 0
        while position < len(part):
            at = start + position
            if not self._begin <= at < self._end:
                self._fetch(at, max(end, start + len(part)))
            count = min(len(part) - position, self._end - at)
            first = at - self._begin
            part[position : position + count] = memoryview(self._window[first : first + count].numpy())  # type: ignore[arg-type]
            position += count

    def _fetch(self, start: int, end: int) -> None:
        size = min(WINDOW_BYTES, end - start)
        self._begin = self._end = 0
        if self._window.numel() < size:
            self._window = torch.empty(size, dtype=torch.uint8)
        self._files.receive_into(self._number, start, self._window[:size])
        self._begin, self._end = start, start + size
