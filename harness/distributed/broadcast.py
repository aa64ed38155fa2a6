"""Broadcast tensors of any type and layout from rank 0, such as buffers that forward changes on each rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.data import memory_layout
from harness.errors import HarnessError


def broadcast_buffers(model: nn.Module, world_size: int) -> None:
    """Broadcast the model's buffers from rank 0, whose buffers a checkpoint contains.

    DDP does this in each forward. Under FSDP and ZeRO each rank updates its own buffers (BatchNorm statistics), so the
    ranks would evaluate different models.

    Effects: collective on the default group; main thread, between steps; blocks.

    Raises:
        HarnessError: on all ranks, if a buffer cannot be viewed as bytes (quantized, sparse).
    """
    if world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if not isinstance(buffer, DTensor):
            broadcast(f"buffer {name}", buffer)


def broadcast_weights(model: nn.Module) -> None:
    """Broadcast the weights and buffers of an unprepared model from rank 0, as DDP does, and FSDP1 on GPUs.

    Effects: collective on the default group; main thread; blocks; nothing on disk.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        broadcast(name, tensor)


def broadcast(name: str, tensor: Tensor) -> None:
    """Broadcast a tensor from rank 0 in place; its type, shape and layout are the same on all ranks.

    The values are sent as bytes in C order, because backends lack types (gloo: 16-bit integers, 8-bit floats) and
    ignore strides. The name is for error messages.

    Effects: collective on the default group; main thread; blocks; nothing on disk.

    Raises:
        HarnessError: on all ranks, if the tensor cannot be viewed as bytes (quantized, sparse).
    """
    with torch.no_grad():
        try:
            flat = memory_layout.flat_view(tensor)
            ordered = memory_layout.contiguous_copy(tensor) if flat is None else flat
            content = ordered.view(torch.uint8)
        except RuntimeError as error:
            raise HarnessError(
                f"{name}: a {tensor.dtype} tensor of layout {tensor.layout} cannot be sent to other ranks; keep it as "
                "a plain tensor, or as an attribute that is no buffer"
            ) from error
        if content.numel():
            dist.broadcast(content, src=0)
        if flat is None:
            memory_layout.copy_into(tensor, ordered)
