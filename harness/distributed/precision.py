"""What mixed precision needs beyond what accelerate does, by strategy."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import ConfigError


def refuse_what_fails(accelerator: Accelerator, model: nn.Module) -> None:
    """Say, before training, what would fail in the first forward.

    Raises:
        ConfigError: for BatchNorm in 16 bits under FSDP and ZeRO: its weights are cast and its statistics
            are not (seen on CPUs).
    """
    casts = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if not casts or accelerator.mixed_precision == "no":
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise ConfigError(
                "trainer.mixed_precision",
                f"{accelerator.mixed_precision} under FSDP and ZeRO fails in BatchNorm ({name or 'the model'}): its "
                "weights would be cast, its statistics not; use fp32, ddp, or GroupNorm",
            )


def cast_inputs(accelerator: Accelerator, model: nn.Module) -> None:
    """Give a DeepSpeed model in 16 bits its floating-point inputs in its own type.

    DDP autocasts and FSDP casts inputs itself; a DeepSpeed engine hands them on as they are, and the
    first layer refuses them.

    Effects: not collective; leaves a hook on the user's module.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED or accelerator.mixed_precision == "no":
        return
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}

    accelerator.unwrap_model(model).register_forward_pre_hook(before_forward, with_kwargs=True)
