"""Buffers that forward changes on each rank by itself (BatchNorm statistics), and what ranks can send one another."""

from __future__ import annotations

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from harness.data import memory_layout
from harness.errors import ConfigError, HarnessError

# What gloo and NCCL both send.
_SENT = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)


def take_rank_zero_buffers(model: nn.Module, world_size: int) -> None:
    """Give every rank the buffers of rank zero, which are the ones that a checkpoint holds.

    DDP does so in each forward; FSDP and ZeRO leave each rank its own, so that the ranks would
    evaluate different models, none of them the one that is saved.

    Effects: collective on the default group; main thread, between steps; blocks until done.

    Raises:
        HarnessError: on all ranks, with the name of a buffer that has no bytes to send (quantized, sparse).
    """
    if world_size == 1:
        return
    for name, buffer in model.named_buffers():
        if not isinstance(buffer, DTensor):
            broadcast(f"buffer {name}", buffer)


def broadcast(name: str, tensor: Tensor) -> None:
    """Give every rank rank zero's values, whatever the type and the layout of the tensor.

    The values are sent as bytes in C order: backends lack types (gloo: 16-bit integers, 8-bit floats), and read memory
    as if it were in order.

    Effects: collective on the default group; main thread; blocks; nothing on disk.

    Args:
        name: for the message.
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


def refuse_what_ddp_cannot_send(accelerator: Accelerator, model: nn.Module) -> None:
    """Name, before DDP is made, a parameter or buffer that DDP cannot send to the other ranks.

    DDP itself fails with "Invalid scalar type" and no name.

    Effects: collective on the default group, one broadcast for each unusual type; main thread; blocks.

    Args:
        accelerator: of a run under DDP.
        model: not prepared yet.

    Raises:
        ConfigError: on all ranks.
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    can_send = dict.fromkeys(_SENT, True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in ignored:
            continue
        if tensor.dtype not in can_send:
            can_send[tensor.dtype] = _can_send(tensor.dtype, accelerator.device)
        if not can_send[tensor.dtype] or tensor.layout != torch.strided:
            raise ConfigError(
                "task",
                f"model(): {name} is of type {tensor.dtype} ({tensor.layout}), which DDP cannot send to other ranks "
                f"over {dist.get_backend()}; keep it in another type and convert it in forward, or use fsdp2",
            )
        if memory_layout.may_overlap(tensor):
            raise ConfigError(
                "task",
                f"model(): elements of {name} share memory (shape {list(tensor.shape)}, strides "
                f"{list(tensor.stride())}), which DDP cannot send to other ranks; give it memory of its own with "
                ".clone()",
            )


def _can_send(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        dist.broadcast(torch.zeros(1, dtype=dtype, device=device), src=0)
    except RuntimeError:
        return False
    return True
