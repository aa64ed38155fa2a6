"""Convert a `DTensor`'s placements (FSDP2, HSDP, tensor parallelism) to ranges of the logical tensor."""

from __future__ import annotations

import math
from functools import lru_cache, reduce

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from harness.checkpoint.format.tensor_shard import ElementRange
from harness.errors import CheckpointError


def ranges_of(name: str, tensor: DTensor) -> tuple[ElementRange, ...]:
    """Return the ranges of a DTensor that this rank holds.

    Effects: not collective; main thread; reads metadata only.

    Raises:
        CheckpointError: if it holds partial sums, or has an unsupported placement.
    """
    mesh, placements, shape = tensor.device_mesh, tensor.placements, tuple(tensor.shape)
    if mesh.get_coordinate() is None:
        return ()  # this rank is outside the mesh
    for placement in placements:
        if placement.is_partial():
            raise CheckpointError(f"{name}: is a partial sum ({placements}); reduce it before saving")
    local_shape = tuple(tensor._local_tensor.shape)
    if 0 in local_shape or 0 in shape:
        return ()
    # The indices of each dimension are independent of the other dimensions.
    indices = [_indices(dim, tensor) for dim in range(len(shape))]
    if tuple(len(part) for part in indices) != local_shape:
        raise CheckpointError(
            f"{name}: its placements {placements} give a local shape of {[len(part) for part in indices]}, "
            f"but it has {list(local_shape)}; this way of sharding is not supported"
        )
    return _ranges(indices, shape)


def _indices(dim: int, tensor: DTensor) -> list[int] | range:
    """Return the indices of a dimension that this rank holds, in the order of the local tensor."""
    size = tensor.shape[dim]
    placements = tensor.placements
    if not any(_is_of(placement, dim) for placement in placements):
        return range(size)
    along = tuple(_along_first(placement) if _is_of(placement, dim) else Replicate() for placement in placements)
    return _divided(size, tensor.device_mesh, along)


@lru_cache(maxsize=1024)
def _divided(size: int, mesh: DeviceMesh, placements: tuple[Placement, ...]) -> list[int] | range:
    """Shard ``arange(size)`` with torch itself, so that uneven and strided sharding are right."""
    numbers = torch.arange(size, device=mesh.device_type)
    mine = distribute_tensor(numbers, mesh, placements, src_data_rank=None).to_local().tolist()
    if not mine:
        return range(0)
    consecutive = range(mine[0], mine[-1] + 1)
    return consecutive if mine == list(consecutive) else mine


def _is_of(placement: Placement, dim: int) -> bool:
    return getattr(placement, "dim", None) == dim


def _along_first(placement: Placement) -> Placement:
    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)


def _ranges(indices: list[list[int] | range], shape: tuple[int, ...]) -> tuple[ElementRange, ...]:
    """Find the consecutive elements (C order) in the outer product of the dimensions' indices."""
    # Complete trailing dimensions are part of every range.
    last = len(shape)
    while last > 0 and indices[last - 1] == range(shape[last - 1]):
        last -= 1
    inner = math.prod(shape[last:])
    if last == 0:
        return (ElementRange(0, 0, inner),) if inner else ()
    first = indices[0]
    if last == 1 and isinstance(first, range):
        return (ElementRange(first.start * inner, 0, len(first) * inner),)
    strides = [math.prod(shape[dim + 1 : last]) for dim in range(last)]
    starts = reduce(
        lambda bases, dim: [base + index * strides[dim] for base in bases for index in indices[dim]], range(last), [0]
    )
    ranges: list[ElementRange] = []
    for position, start in enumerate(starts):
        if ranges and ranges[-1].logical + ranges[-1].num_items == start * inner:
            ranges[-1] = ranges[-1]._replace(num_items=ranges[-1].num_items + inner)
        else:
            ranges.append(ElementRange(start * inner, position * inner, inner))
    return tuple(ranges)
