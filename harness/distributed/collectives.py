"""Make collective calls that carry small values, over a separate gloo group.

Values are sent as JSON and tensors (`harness.distributed.rank_values`), so nothing received is unpickled. The calls are
for rare events (start, a due checkpoint, end), not for each step.

This module calls the methods of the group, not the functions of `torch.distributed`, which refuse every group once a
script has called `destroy_process_group()`. The group stays connected, and a run may end after that call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from harness.distributed import rank_values
from harness.errors import CheckpointError, DamagedError, HarnessError, PeerFailure

T = TypeVar("T")


class Collectives:
    """Makes collective calls with a time limit, each named for error messages; a single rank communicates nothing.

    Effects: collective on its own group, which the constructor creates on all ranks; main thread; each call blocks
    until the other ranks make the same call, at most `timeout_s`, and raises `PeerFailure` if a rank is gone; nothing
    on disk.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 1800.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def broadcast_from_rank_zero(self, what: str, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 only and return its result, encoded by `rank_values`, on all ranks.

        Error messages name the work with `what`, such as ``make the run directory``.

        Raises:
            Exception: on rank 0, the error that `make` raised.
            PeerFailure: on the other ranks, with the text of that error.
        """
        if self._group is None:
            return make()
        content = bytearray()
        failure: Exception | None = None
        if self.rank == 0:
            try:
                result = make()
                content = rank_values.encode(["ok", result])
            except Exception as error:
                failure = error
                content = rank_values.encode(["failed", str(error)])
        try:
            received = _broadcast(self._group, content)
        except RuntimeError as error:
            raise PeerFailure(None, f"waiting for rank 0 to {what}: {error}") from (failure or error)
        if failure is not None:
            raise failure
        if self.rank == 0:
            return result
        status, value = rank_values.decode(received)
        if status == "failed":
            raise PeerFailure(0, str(value))
        return cast(T, value)

    def all_gather(self, what: str, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on all ranks. Error messages name the values with `what`.

        Raises:
            PeerFailure: on all ranks, if a rank is gone or its value cannot be encoded.
        """
        if self._group is None:
            return [value]
        # A rank whose value cannot be encoded still takes part, otherwise the others would block.
        try:
            mine = rank_values.encode(["ok", value])
        except TypeError as error:
            mine = rank_values.encode(["failed", str(error)])
        try:
            contents = _all_gather(self._group, mine)
        except RuntimeError as error:
            raise PeerFailure(None, f"exchanging {what}: {error}") from error
        results = [rank_values.decode(content) for content in contents]
        for rank, (status, result) in enumerate(results):
            if status == "failed":
                raise PeerFailure(rank, f"exchanging {what}: {result}")
        return [result for _, result in results]

    def gather_to_rank_zero(self, what: str, value: bytes) -> list[bytes] | None:
        """Return the bytes of all ranks, in rank order, on rank 0; None on the other ranks."""
        if self._group is None:
            return [value]
        try:
            return _gather(self._group, value)
        except RuntimeError as error:
            raise PeerFailure(None, f"sending {what} to rank 0: {error}") from error

    def run_on_all_ranks(self, what: str, run: Callable[[], T]) -> T:
        """Run local, non-collective work on every rank and return this rank's result; fail on all ranks if one fails.

        Error messages name the work with `what`, such as ``reading the manifest``.

        Raises:
            DamagedError: on all ranks, if every failed rank raised it.
            CheckpointError: on all ranks, if a rank failed in another way.
        """
        failure: CheckpointError | None = None
        try:
            result = run()
        except CheckpointError as error:
            failure = error
        except Exception as error:
            is_ours = isinstance(error, HarnessError)
            failure = CheckpointError(str(error) if is_ours else f"{what}: {type(error).__name__}: {error}")
            failure.__cause__ = error
        mine = None if failure is None else (isinstance(failure, DamagedError), str(failure))
        failed = [(rank, *each) for rank, each in enumerate(self.all_gather(f"the outcome of {what}", mine)) if each]
        if not failed:
            return result
        # A caller falls back to another checkpoint only on damage, so any other failure has precedence.
        rank, is_damage, text = min(failed, key=lambda each: each[1])
        if failure is not None and isinstance(failure, DamagedError) == is_damage:
            raise failure
        raise (DamagedError if is_damage else CheckpointError)(f"rank {rank}: {text}") from failure

    def all_gather_numbers(self, what: str, numbers: Sequence[int]) -> list[list[int]]:
        """Return the integers of all ranks, in rank order, on all ranks; every rank passes equally many."""
        if self._group is None:
            return [list(numbers)]
        # All-to-all takes one round. gloo's all-gather is a ring, and each of its rounds waits for every rank's thread.
        mine = torch.tensor([numbers] * self.world_size, dtype=torch.int64)
        values = torch.empty_like(mine)
        try:
            self._group.alltoall_base(values, mine, [], []).wait()
        except RuntimeError as error:
            raise PeerFailure(None, f"exchanging {what}: {error}") from error
        found: list[list[int]] = values.tolist()
        return found

    def all_reduce_any(self, what: str, flags: Sequence[bool]) -> list[bool]:
        """Return for each flag whether any rank sets it; every rank passes equally many flags, possibly millions."""
        if self._group is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        try:
            self._group.allreduce([found], dist.ReduceOp.MAX).wait()
        except RuntimeError as error:
            raise PeerFailure(None, f"exchanging {what}: {error}") from error
        return [bool(flag) for flag in found.tolist()]

    def start_count(self, what: str, flags: Sequence[bool]) -> PendingCount:
        """Start to count the ranks that set each flag; `PendingCount.wait` returns the counts.

        Effects: as for the class, but does not block. Other collective calls may precede `wait`, on every rank alike.
        """
        counts = torch.tensor(flags, dtype=torch.int64)
        if self._group is None:
            return PendingCount(what, counts, None)
        try:
            return PendingCount(what, counts, self._group.allreduce([counts]))
        except RuntimeError as error:
            raise PeerFailure(None, f"exchanging {what}: {error}") from error


class PendingCount:
    """Counts that are being reduced, from `Collectives.start_count`."""

    def __init__(self, what: str, counts: torch.Tensor, work: dist.Work | None) -> None:
        self._what = what
        self._counts = counts
        self._work = work

    def wait(self) -> list[int]:
        """Return for each flag the number of ranks that set it.

        Effects: main thread; blocks until all ranks have started the count.

        Raises:
            PeerFailure: if a rank is gone or exceeds the time limit.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                raise PeerFailure(None, f"exchanging {self._what}: {error}") from error
        counts: list[int] = self._counts.tolist()
        return counts


def _broadcast(group: dist.ProcessGroup, content: bytes | bytearray) -> bytes:
    size = torch.tensor([len(content)])
    group.broadcast(size, 0).wait()
    data = _tensor(content, int(size))
    group.broadcast(data, 0).wait()
    return bytes(data.numpy())[: int(size)]


def _all_gather(group: dist.ProcessGroup, content: bytes | bytearray) -> list[bytes]:
    sizes = _sizes(group, len(content))
    found = [_tensor(b"", max(sizes)) for _ in sizes]
    group.allgather([found], [_tensor(content, max(sizes))]).wait()
    return [bytes(data.numpy())[:size] for data, size in zip(found, sizes, strict=True)]


def _gather(group: dist.ProcessGroup, content: bytes | bytearray) -> list[bytes] | None:
    sizes = _sizes(group, len(content))
    found = [_tensor(b"", max(sizes)) for _ in sizes] if group.rank() == 0 else []
    options = dist.GatherOptions()
    options.rootRank = 0
    group.gather([found] if found else [], [_tensor(content, max(sizes))], options).wait()
    return [bytes(data.numpy())[:size] for data, size in zip(found, sizes, strict=True)] if found else None


def _sizes(group: dist.ProcessGroup, size: int) -> list[int]:
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    group.allgather([sizes], [torch.tensor([size])]).wait()
    return [int(each) for each in sizes]


def _tensor(content: bytes | bytearray, size: int) -> torch.Tensor:
    """Convert bytes to a zero-padded uint8 tensor of shape (max(size, 1),)."""
    return torch.frombuffer(bytearray(content.ljust(max(1, size), b"\0")), dtype=torch.uint8)
