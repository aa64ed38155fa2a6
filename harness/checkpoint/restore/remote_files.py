"""Files for ranks that do not see them: a rank that does reads what they ask for, and sends it.

    rank that is blind   (file, first byte, how many)  ->
                                                       <-  that it is well, and the bytes; or what went wrong
                         done                          ->

Over a gloo group of its own, from the main thread of both, 16 MiB at a time: so much memory on either side. A
rank asks for what it wants and for nothing else. Ranks that see the files serve the blind ones in turn, each of
them some, before they read for themselves.
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
# As a first byte: the length of the file is asked for.
_LENGTH = -1
_LENGTH_BYTES = 8
# An answer: how it went, and how many bytes follow, of the file or of a text.
_ANSWER_NUMBERS = 2
_WELL, _DAMAGED, _FAILED = range(3)


class RemoteFiles:
    """Makes files that some ranks read from others.

    Effects: nothing before the first call of `files`, and that only where there are blind ranks.

    Args:
        collectives: of all ranks.
        timeout_s: limit of the wait for one request, in seconds; one for an answer is twice as long, as other ranks
            may be served before.
    """

    def __init__(self, collectives: Collectives, timeout_s: float = 300.0) -> None:
        self._collectives = collectives
        self._timeout_s = timeout_s
        self._group: ProcessGroup | None = None

    def files(self, directory: Path, names: Sequence[str], blind: Sequence[int]) -> Files:
        """The files of a directory, for every rank.

        Effects: collective (makes a group at the first call); main thread; nothing on disk. What is read between
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
            # Neighbours are of one node: each of those that see serves some of every other node.
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
        # They wait; for this rank, nobody does until all are done.
        self._serve()
        return run()

    def _serve(self) -> None:
        """Answer until every client has said that it is done, or is gone.

        Raises:
            CheckpointError: if one is gone, when the others have been served; or does not ask in time, which with
                gloo ends every connection of this rank's.
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
                        what = "say which bytes of the checkpoint it wants"
                        number, start, size = self._link.receive(client, request, what, self._link.timeout_s).tolist()
                        if number == _DONE:
                            waiting.remove(client)
                            continue
                        if number not in files:
                            files[number] = stack.enter_context(_opened_later(self, self._names[number]))
                        self._answer(client, *_read(files[number], start, window[:size]))
                    except CheckpointError as error:
                        waiting.remove(client)
                        failures.append(error)
        if failures:
            raise failures[0]

    def _answer(self, client: int, status: int, content: Tensor) -> None:
        what = "take a part of the checkpoint"
        self._link.send(client, torch.tensor([status, content.numel()]), what)
        self._link.send(client, content, what)


def _read(file: OpenFile, start: int, window: Tensor) -> tuple[int, Tensor]:
    """How it went, and what follows the answer."""
    try:
        if start == _LENGTH:
            return _WELL, torch.tensor([file.size_bytes()]).view(torch.uint8)
        file.fill(memoryview(window.numpy()), start, start + window.numel())  # type: ignore[arg-type]
        return _WELL, window
    except Exception as error:
        status = _DAMAGED if isinstance(error, DamagedError) else _FAILED
        return status, torch.frombuffer(bytearray(str(error).encode() or b"?"), dtype=torch.uint8)


@contextmanager
def _opened_later(files: LocalFiles, name: str) -> Iterator[OpenFile]:
    """A file that is opened when it is read, so that what goes wrong is told to who reads it."""
    with ExitStack() as stack:
        yield _Later(lambda: stack.enter_context(files.opened(name)))


class _Later:
    def __init__(self, make: Callable[[], OpenFile]) -> None:
        self._make = make
        self._file: OpenFile | None = None

    def _open(self) -> OpenFile:
        self._file = self._file or self._make()
        return self._file

    def size_bytes(self) -> int:
        return self._open().size_bytes()

    def fill(self, part: memoryview, start: int, end: int) -> None:
        self._open().fill(part, start, end)


class _SentFiles:
    """Files of which another rank sends what this one wants."""

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
            # Where that cannot be said the server knows it: the connection is gone.
            with suppress(CheckpointError):
                self._request(_DONE, 0, 0)

    def ask(self, number: int, start: int, content: Tensor) -> None:
        """Have bytes of a file sent.

        Raises:
            DamagedError, CheckpointError: what the server ran into, or that it is gone.
        """
        self._request(number, start, content.numel())
        answer = torch.empty(_ANSWER_NUMBERS, dtype=torch.int64)
        status, size = self._receive(answer).tolist()
        if status == _WELL:
            self._receive(content)
            return
        text = bytes(self._receive(torch.empty(size, dtype=torch.uint8)).numpy()).decode()
        raise (DamagedError if status == _DAMAGED else CheckpointError)(f"from rank {self._server}: {text}")

    def _request(self, number: int, start: int, size: int) -> None:
        self._link.send(self._server, torch.tensor([number, start, size]), "take a request for bytes of the checkpoint")

    def _receive(self, content: Tensor) -> Tensor:
        return self._link.receive(self._server, content, f"send bytes of {self.directory}", 2 * self._link.timeout_s)


class _SentFile:
    def __init__(self, files: _SentFiles, number: int) -> None:
        self._files = files
        self._number = number
        self._window = torch.empty(0, dtype=torch.uint8)
        # What of the file is in it.
        self._begin = self._end = 0

    def size_bytes(self) -> int:
        length = torch.empty(_LENGTH_BYTES, dtype=torch.uint8)
        self._files.ask(self._number, _LENGTH, length)
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
        self._files.ask(self._number, start, self._window[:size])
        self._begin, self._end = start, start + size
