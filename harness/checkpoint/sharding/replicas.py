"""Check that ranks that hold the same part of a tensor hold the same values.

These ranks each write a section of that part; if they differ, the checkpoint matches no rank's state.
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


def check_replicas(shards: Sequence[TensorShard], sharing: Sharing, collectives: Collectives) -> None:
    """Compare replicated parts by sums over samples of each tensor.

    A sample has 65,536 to about 131,072 elements, or all of a smaller tensor. All ranks exchange hashes of the sums,
    and the sums themselves only if hashes differ.

    Effects: collective; main thread; synchronizes with CUDA to read the sums.

    Raises:
        CheckpointError: on all ranks, with the first tensor that differs, or if a rank cannot compute its sums.
    """
    mine = [indices for ranks, indices in sharing.items() if collectives.rank in ranks]
    sums: list[list[int]] = []
    failure: Exception | None = None
    try:
        with torch.no_grad():
            flat = iter(_read_numbers([_sum(shards[index]) for indices in mine for index in indices]))
            sums = [list(islice(flat, len(indices))) for indices in mine]
    except (RuntimeError, struct.error) as error:
        failure = error
    hashes = [xxhash.xxh3_64_intdigest(repr(each).encode()) for each in sums]
    reports = collectives.all_gather("hashes of replicas", (hashes, None if failure is None else str(failure)))
    for rank, (_, text) in enumerate(reports):
        if text is not None:
            raise CheckpointError(f"rank {rank}: cannot compare its tensors with other ranks': {text}") from failure
    if _differing(sharing, [each for each, _ in reports]):
        _raise_first_difference(shards, sharing, collectives.all_gather("sums of replicas", sums))


def _differing(sharing: Sharing, reports: Sequence[Sequence[Any]]) -> list[tuple[int, int, int, int]]:
    """Find the groups in which a rank's report differs from that of the group's first rank.

    Returns:
        For each: index of the group, its index in the first rank's report and in the other rank's, the other rank.
    """
    position = [0] * len(reports)
    found = []
    for number, ranks in enumerate(sharing):
        at = {rank: position[rank] for rank in ranks}
        for rank in ranks:
            position[rank] += 1
            if reports[rank][at[rank]] != reports[ranks[0]][at[ranks[0]]]:
                found.append((number, at[ranks[0]], at[rank], rank))
    return found


def _raise_first_difference(
    shards: Sequence[TensorShard], sharing: Sharing, sums: Sequence[Sequence[Sequence[int]]]
) -> None:
    groups = list(sharing.items())
    first = None
    for number, of_first, of_rank, rank in _differing(sharing, sums):
        ranks, indices = groups[number]
        pairs = zip(indices, sums[ranks[0]][of_first], sums[rank][of_rank], strict=True)
        index = next(index for index, one, other in pairs if one != other)
        first = min(first or (index, rank, ranks[0]), (index, rank, ranks[0]))
    assert first is not None
    index, rank, one = first
    raise CheckpointError(
        f"{shards[index].spec.name}: rank {rank} holds other values than rank {one}, though the "
        "same part of it, so a checkpoint would match no rank's state; make the model alike on all ranks "
        "(one seed, one file) and change it only in ways that are the same on all of them (stochastic "
        "rounding is not)"
    )


def _sum(shard: TensorShard) -> Tensor | int:
    value: Any = shard.live()
    if not isinstance(value, Tensor):
        number: int = struct.unpack("q", struct.pack("d" if isinstance(value, float) else "q", value))[0]
        return number
    flat = value.detach().reshape(-1)
    stride = max(1, sum(part.num_items for part in shard.ranges) // _MAX_SAMPLES)
    parts = [flat[part.local : part.local + part.num_items : stride] for part in shard.ranges]
    # Sum the bits as integers: the order of summation does not matter, and equal NaNs compare as equal.
    samples = torch.cat(parts).view(_INTEGERS[value.element_size()])
    return samples.sum(dtype=torch.int64)


def _read_numbers(sums: Sequence[Tensor | int]) -> list[int]:
    """Read the values of all sums, with one synchronization for each device."""
    values: dict[int, int] = {}
    tensors = [each for each in sums if isinstance(each, Tensor)]
    for device in {each.device for each in tensors}:
        there = [each for each in tensors if each.device == device]
        values.update(zip(map(id, there), torch.stack(there).tolist(), strict=True))
    return [values[id(each)] if isinstance(each, Tensor) else each for each in sums]
