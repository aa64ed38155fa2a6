"""Broadcast tensors of any type and layout from rank 0, such as buffers that forward changes on each rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.data import memory_layout
from harness.errors import HarnessError


def broadcast_buffers(model: nn.Module, world_size: int) -> None:
    """Give every rank the buffers of rank 0, which are those that a checkpoint contains.

    DDP does so in each forward. FSDP and ZeRO leave each rank its own buffers (BatchNorm statistics), so that ranks
    would evaluate different models and save another.

    Effects: collective on the default group; main thread, between steps; blocks until done.

    Raises:
        HarnessError: on all ranks, with the name of a buffer that has no bytes to send (quantized, sparse).
    """
    if world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if not isinstance(buffer, DTensor):
            broadcast(f"buffer {name}", buffer)


def broadcast_weights(model: nn.Module) -> None:
    """Give every rank the weights and buffers of rank 0, as FSDP1 does on GPUs and DDP anywhere.

    Effects: collective on the default group; main thread; blocks; nothing on disk.

    Args:
        model: not prepared yet.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        broadcast(name, tensor)


def broadcast(name: str, tensor: Tensor) -> None:
    """Give every rank the values of rank 0, in place.

    The values are sent as bytes in C order: backends lack types (gloo: 16-bit integers, 8-bit floats) and ignore
    strides.

    Effects: collective on the default group; main thread; blocks; nothing on disk.

    Args:
        name: for error messages.
        tensor: of the same type, shape and layout on all ranks.

    Raises:
        HarnessError: on all ranks, if the tensor has no bytes to send (quantized, sparse).
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
