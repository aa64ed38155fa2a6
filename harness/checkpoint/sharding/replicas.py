"""Whether ranks that hold the same part of a tensor hold the same values.

They divide the writing of it, so where they differ a checkpoint would be of no rank's state.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import xxhash
from torch import Tensor

from harness.checkpoint.format.tensor_shard import TensorShard
from harness.checkpoint.sharding.shard_catalog import Sharing
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError

_MAX_SAMPLES = 1 << 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(sources: Sequence[TensorShard], sharing: Sharing, collectives: Collectives) -> None:
    """Compare what several ranks hold, by sums over at most 65,536 elements of each tensor, bit for bit.

    A hash of the sums is exchanged for each group of ranks, and the sums themselves only where that differs.

    Effects: collective; main thread; blocks for a read of the samples, on CUDA until the device is done;
    nothing on disk.

    Args:
        sources: what this rank holds.
        sharing: which ranks hold the same of which.
        collectives: of all ranks.

    Raises:
        CheckpointError: on all ranks, with the first tensor that differs.
    """
    mine = [tensors for ranks, tensors in sharing.items() if collectives.rank in ranks]
    sums: list[list[int]] = []
    failure: Exception | None = None
    try:
        with torch.no_grad():
            flat = iter(_numbers([_sum(sources[index]) for tensors in mine for index in tensors]))
            sums = [list(islice(flat, len(tensors))) for tensors in mine]
    except (RuntimeError, struct.error) as error:
        failure = error
    hashes = [xxhash.xxh3_64_intdigest(repr(each).encode()) for each in sums]
    told = collectives.all_gather("what ranks hold in common", (hashes, None if failure is None else str(failure)))
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: cannot compare its tensors with other ranks': {text}") from failure
    if _differing(sharing, [each for each, _ in told]):
        _refuse_first(sources, sharing, collectives.all_gather("sums of what ranks hold in common", sums))


def _differing(sharing: Sharing, told: Sequence[Sequence[Any]]) -> list[tuple[int, int, int, int]]:
    """Where a rank has told another thing than the first of its group.

    Returns:
        Number of the group; which of the first rank's groups it is, and which of the other's; the other rank.
    """
    position = [0] * len(told)
    found = []
    for number, ranks in enumerate(sharing):
        at = {rank: position[rank] for rank in ranks}
        for rank in ranks:
            position[rank] += 1
            if told[rank][at[rank]] != told[ranks[0]][at[ranks[0]]]:
                found.append((number, at[ranks[0]], at[rank], rank))
    return found


def _refuse_first(sources: Sequence[TensorShard], sharing: Sharing, sums: Sequence[Sequence[Sequence[int]]]) -> None:
    groups = list(sharing.items())
    first = None
    for number, of_first, of_rank, rank in _differing(sharing, sums):
        ranks, tensors = groups[number]
        pairs = zip(tensors, sums[ranks[0]][of_first], sums[rank][of_rank], strict=True)
        index = next(index for index, one, other in pairs if one != other)
        first = min(first or (index, rank, ranks[0]), (index, rank, ranks[0]))
    assert first is not None
    index, rank, one = first
    raise CheckpointError(
        f"{sources[index].spec.name}: rank {rank} holds other values than rank {one}, though the "
        "same part of it, so a checkpoint would be of no rank's state; make the model alike on all ranks "
        "(one seed, one file) and change it only in ways that are the same on all of them (stochastic "
        "rounding is not)"
    )


def _sum(source: TensorShard) -> Tensor | int:
    value: Any = source.live()
    if not isinstance(value, Tensor):
        number: int = struct.unpack("q", struct.pack("d" if isinstance(value, float) else "q", value))[0]
        return number
    flat = value.detach().reshape(-1)
    stride = max(1, sum(run.num_items for run in source.runs) // _MAX_SAMPLES)
    parts = [flat[run.local : run.local + run.num_items : stride] for run in source.runs]
    # As integers: an order of summation does not matter, and a NaN is a number like others.
    samples = torch.cat(parts).view(_INTEGERS[value.element_size()])
    return samples.sum(dtype=torch.int64)


def _numbers(sums: Sequence[Tensor | int]) -> list[int]:
    """All of them with one wait for each device."""
    values: dict[int, int] = {}
    tensors = [each for each in sums if isinstance(each, Tensor)]
    for device in {each.device for each in tensors}:
        there = [each for each in tensors if each.device == device]
        values.update(zip(map(id, there), torch.stack(there).tolist(), strict=True))
    return [values[id(each)] if isinstance(each, Tensor) else each for each in sums]
