"""What all ranks must decide alike: small objects over a gloo group of our own, from the main thread.

Objects travel as JSON and tensors (`harness.distributed.rank_values`): nothing that arrives is unpickled.

Rare by design (a start, a due checkpoint, an end): nothing here runs at each step.

The group's own methods are called, not the functions of `torch.distributed`: those refuse every group once the script
has called `destroy_process_group()`, and a run ends after that too. The group itself stays connected.
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
    """Collective calls that carry small values, each with a time limit and a name.

    Effects: collective on its own group, made here by all ranks; main thread; each call blocks until
    the other ranks make the same call, at most `timeout_s`; nothing on disk.

    Args:
        rank: this rank.
        world_size: number of ranks; with 1 nothing is communicated.
        timeout_s: limit of each wait, in seconds.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float = 1800.0) -> None:
        self.rank = rank
        self.world_size = world_size
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def from_rank_zero(self, what: str, make: Callable[[], T]) -> T:
        """Call `make` on rank zero and give its result to all ranks.

        Args:
            what: names the wait, should it end badly.
            make: called on rank zero only; the result is of what `harness.distributed.rank_values` takes.

        Raises:
            Exception: on rank zero what `make` raised; on the other ranks `PeerFailure` with its text.
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

    def gather(self, what: str, value: T) -> list[T]:
        """Each rank's value, in the order of ranks, on all ranks.

        Args:
            what: names the wait, should it end badly.
            value: as `harness.distributed.rank_values` takes it.

        Raises:
            PeerFailure: on all ranks, if a rank is gone, or its value cannot be sent.
        """
        if self._group is None:
            return [value]
        # A value that cannot be sent must not leave the others waiting for it.
        try:
            mine = rank_values.encode(["ok", value])
        except TypeError as error:
            mine = rank_values.encode(["failed", str(error)])
        try:
            contents = _all_gather(self._group, mine)
        except RuntimeError as error:
            raise PeerFailure(None, f"exchanging {what}: {error}") from error
        answers = [rank_values.decode(content) for content in contents]
        for rank, (status, answer) in enumerate(answers):
            if status == "failed":
                raise PeerFailure(rank, f"exchanging {what}: {answer}")
        return [answer for _, answer in answers]

    def to_rank_zero(self, what: str, value: bytes) -> list[bytes] | None:
        """Each rank's bytes, in the order of ranks, on rank zero; None elsewhere. For what nobody else needs."""
        if self._group is None:
            return [value]
        try:
            return _gather(self._group, value)
        except RuntimeError as error:
            raise PeerFailure(None, f"telling rank 0 {what}: {error}") from error

    def together(self, what: str, run: Callable[[], T]) -> T:
        """Run on each rank what is not collective; if it fails on one, it fails on all, with the same class.

        Args:
            what: is done, for messages: ``reading the manifest``.
            run: called on every rank.

        Returns:
            This rank's own result.

        Raises:
            DamagedError: on all ranks, if it was raised on each rank that failed.
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
        failed = [(rank, *each) for rank, each in enumerate(self.gather(f"who is done with {what}", mine)) if each]
        if not failed:
            return result
        # Another checkpoint helps against damage alone: what is none counts, and of these the first rank's.
        rank, is_damage, text = min(failed, key=lambda each: each[1])
        if failure is not None and isinstance(failure, DamagedError) == is_damage:
            raise failure
        raise (DamagedError if is_damage else CheckpointError)(f"rank {rank}: {text}") from failure

    def gather_numbers(self, what: str, numbers: Sequence[int]) -> list[list[int]]:
        """Each rank's whole numbers, as many on each, in the order of ranks, on all ranks. One round trip."""
        if self._group is None:
            return [list(numbers)]
        # Everybody to everybody, at once: a gather goes around a ring, and each round waits for every rank's thread.
        mine = torch.tensor([numbers] * self.world_size, dtype=torch.int64)
        values = torch.empty_like(mine)
        try:
            self._group.alltoall_base(values, mine, [], []).wait()
        except RuntimeError as error:
            raise PeerFailure(None, f"agreeing on {what}: {error}") from error
        found: list[list[int]] = values.tolist()
        return found

    def on_any(self, what: str, flags: Sequence[bool]) -> list[bool]:
        """Of each flag, whether it is set on any rank. As many on each rank, and they may be millions."""
        if self._group is None:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        try:
            self._group.allreduce([found], dist.ReduceOp.MAX).wait()
        except RuntimeError as error:
            raise PeerFailure(None, f"agreeing on {what}: {error}") from error
        return [bool(flag) for flag in found.tolist()]

    def begin_count(self, what: str, flags: Sequence[bool]) -> Callable[[], list[int]]:
        """Begin to count on how many ranks each flag is set; the call of what it returns waits for the counts.

        Effects: as the class's, except that this call does not block. Other calls may come between the two, if
        they do on every rank.
        """
        if self._group is None:
            return lambda: [int(flag) for flag in flags]
        counts = torch.tensor(flags, dtype=torch.int64)

        def wait() -> list[int]:
            try:
                work.wait()
            except RuntimeError as error:
                raise PeerFailure(None, f"agreeing on {what}: {error}") from error
            found: list[int] = counts.tolist()
            return found

        try:
            work = self._group.allreduce([counts])
        except RuntimeError as error:
            raise PeerFailure(None, f"agreeing on {what}: {error}") from error
        return wait


def _broadcast(group: dist.ProcessGroup, content: bytes | bytearray) -> bytes:
    """Rank zero's bytes, on all ranks."""
    size = torch.tensor([len(content)])
    group.broadcast(size, 0).wait()
    data = _tensor(content, int(size))
    group.broadcast(data, 0).wait()
    return bytes(data.numpy())[: int(size)]


def _all_gather(group: dist.ProcessGroup, content: bytes | bytearray) -> list[bytes]:
    """Each rank's bytes, in the order of ranks, on all ranks."""
    sizes = _sizes(group, len(content))
    found = [_tensor(b"", max(sizes)) for _ in sizes]
    group.allgather([found], [_tensor(content, max(sizes))]).wait()
    return [bytes(data.numpy())[:size] for data, size in zip(found, sizes, strict=True)]


def _gather(group: dist.ProcessGroup, content: bytes | bytearray) -> list[bytes] | None:
    """Each rank's bytes, in the order of ranks, on rank zero; None elsewhere."""
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
    """Bytes as uint8 of shape (size,), at least one."""
    return torch.frombuffer(bytearray(content.ljust(max(1, size), b"\0")), dtype=torch.uint8)
