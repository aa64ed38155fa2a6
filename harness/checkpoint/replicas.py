"""Whether ranks that hold the same part of a tensor hold the same values.

They divide the writing of it, so where they differ a checkpoint would be of no rank's state.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from harness.agreement import Agreement
from harness.checkpoint.shards.source import Run, Source
from harness.errors import CheckpointError

_MAX_SAMPLES = 1 << 16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(sources: Sequence[Source], held: Sequence[Sequence[tuple[Run, ...]]], agreement: Agreement) -> None:
    """Compare what several ranks hold, by sums over at most 65,536 elements of each tensor, bit for bit.

    Effects: collective; main thread; blocks for a read of the samples, on CUDA until the device is done;
    nothing on disk.

    Args:
        sources: what this rank holds.
        held: for each rank, for each tensor: which part.
        agreement: of all ranks.

    Raises:
        CheckpointError: on all ranks, with the first tensor that differs.
    """
    shared = [(index, ranks) for index in range(len(sources)) for ranks in _sharers([part[index] for part in held])]
    mine = [sources[index] for index, ranks in shared if agreement.rank in ranks]
    sums: list[int] = []
    failure: Exception | None = None
    try:
        with torch.no_grad():
            sums = _numbers([_sum(source) for source in mine])
    except (RuntimeError, struct.error) as error:
        failure = error
    told = agreement.gather("sums of what ranks hold in common", (sums, None if failure is None else str(failure)))
    for rank, (_, text) in enumerate(told):
        if text is not None:
            raise CheckpointError(f"rank {rank}: cannot compare its tensors with other ranks': {text}") from failure
    position = [0] * agreement.world_size
    for index, ranks in shared:
        values = [told[rank][0][position[rank]] for rank in ranks]
        for rank in ranks:
            position[rank] += 1
        for rank, value in zip(ranks, values, strict=True):
            if value != values[0]:
                raise CheckpointError(
                    f"{sources[index].spec.name}: rank {rank} holds other values than rank {ranks[0]}, though the "
                    "same part of it, so a checkpoint would be of no rank's state; make the model alike on all ranks "
                    "(one seed, one file) and change it only in ways that are the same on all of them (stochastic "
                    "rounding is not)"
                )


def _sharers(parts: Sequence[tuple[Run, ...]]) -> list[list[int]]:
    """Groups of ranks that hold the same part of a tensor."""
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank, runs in enumerate(parts):
        if runs:
            groups.setdefault(tuple((run.logical, run.num_items) for run in runs), []).append(rank)
    return [ranks for ranks in groups.values() if len(ranks) > 1]


def _sum(source: Source) -> Tensor | int:
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
