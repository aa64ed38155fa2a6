"""Buffers that forward changes on each rank by itself (BatchNorm statistics)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


def take_rank_zero_buffers(model: nn.Module, world_size: int) -> None:
    """Give every rank the buffers of rank zero, which are the ones that a checkpoint holds.

    DDP does so in each forward; FSDP and ZeRO leave each rank its own, so that the ranks would
    evaluate different models, none of them the one that is saved.

    Effects: collective on the default group; main thread, between steps; blocks until done.
    """
    if world_size == 1:
        return
    with torch.no_grad():
        for buffer in model.buffers():
            if not isinstance(buffer, DTensor):
                dist.broadcast(buffer, src=0)
