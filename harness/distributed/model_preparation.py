"""Check and change a model before and after accelerate prepares it, by strategy.

before  `check_mixed_precision`  FSDP, ZeRO  refuse BatchNorm in 16 bits
        `check_ddp_tensors`      DDP         refuse tensors that DDP cannot send, by name
        `separate_embeddings`    FSDP2       assign each parameter to one group
after   `cast_inputs`            ZeRO        cast floating-point inputs to the model's type
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.data import memory_layout
from harness.errors import ConfigError

# Types that both gloo and NCCL send.
_SENDABLE = frozenset(
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


def check_mixed_precision(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse BatchNorm in 16 bits under FSDP and ZeRO, which would fail in its first forward.

    Both cast its weights but not its statistics (seen on CPUs).

    Raises:
        ConfigError: with the module's name.
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


def check_ddp_tensors(accelerator: Accelerator, model: nn.Module) -> None:
    """Refuse a parameter or buffer of an unprepared model that DDP cannot broadcast.

    DDP itself fails with "Invalid scalar type" and without a name.

    Effects: collective on the default group, one broadcast for each unusual type; main thread; blocks.

    Raises:
        ConfigError: on all ranks, with the tensor's name.
    """
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    can_send = dict.fromkeys(_SENDABLE, True)
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
                f"{list(tensor.stride())}), which DDP cannot send to other ranks; give it its own memory with "
                ".clone()",
            )


def _can_send(dtype: torch.dtype, device: torch.device) -> bool:
    try:
        dist.broadcast(torch.zeros(1, dtype=dtype, device=device), src=0)
    except RuntimeError:
        return False
    return True


def cast_inputs(accelerator: Accelerator, model: nn.Module) -> None:
    """Cast the floating-point inputs of a 16-bit DeepSpeed model to its type, which the engine does not do.

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


def separate_embeddings(accelerator: Accelerator, model: nn.Module) -> None:
    """Assign the embeddings of an unprepared transformers model to one FSDP2 group each; do nothing without FSDP2.

    accelerate shards the layers that the model names (`_no_split_modules`), then the input and output embeddings
    separately, then the rest. torch fails on a parameter in two groups:

        a layer contains an embedding (`BertEmbeddings`, `ViTEmbeddings`)           "value was None"
        other modules share the embedding's weight (T5's encoder and decoder)       "is shared with a parameter ..."

    Therefore layers that contain an embedding are not sharded as layers, and modules that are identical to the input
    embedding are replaced by it. Names in the model's state do not change.

    Effects: changes accelerate's plugin and the model; not collective, and the same on every rank; nothing on disk.

    Raises:
        ConfigError: if the user names a layer that contains an embedding.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2:
        return
    embeddings = [_embedding(model, name) for name in ("get_input_embeddings", "get_output_embeddings")]
    if embeddings[0] is not None:
        _unite(model, embeddings[0])
    if _wraps_layers(plugin):
        _choose_layers(plugin, model, [each for each in embeddings if each is not None])


def _unite(model: nn.Module, embedding: nn.Module) -> None:
    """Replace modules that share the embedding's parameters and have its options by the embedding."""
    own = dict(embedding.named_parameters())
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is embedding or type(child) is not type(embedding) or not own:
                continue
            parameters = dict(child.named_parameters())
            is_tied = parameters.keys() == own.keys() and all(parameters[key] is own[key] for key in own)
            if is_tied and _options(child) == _options(embedding):
                setattr(parent, name, embedding)


def _options(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if not key.startswith("_")}


def _choose_layers(plugin: Any, model: nn.Module, embeddings: list[nn.Module]) -> None:
    requested = plugin.transformer_cls_names_to_wrap
    names = list(getattr(model, "_no_split_modules", None) or []) if requested is None else list(requested)
    holding = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__ in names
        and any(inner is each for inner in list(module.modules())[1:] for each in embeddings)
    }
    if not holding:
        return
    others = [name for name in names if name not in holding]
    if requested is not None:
        raise ConfigError(
            "FSDP_TRANSFORMER_CLS_TO_WRAP",
            f"names {', '.join(sorted(holding))}, which holds an embedding that accelerate shards separately under "
            f"FSDP2; give {','.join(others) or 'only the class of the layers'} "
            "(fsdp_transformer_layer_cls_to_wrap in a configuration file of accelerate)",
        )
    plugin.transformer_cls_names_to_wrap = others


def _wraps_layers(plugin: Any) -> bool:
    policy = getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy)
    return getattr(policy, "__name__", "") == "transformer_auto_wrap_policy"


def _embedding(model: nn.Module, name: str) -> Any:
    method = getattr(model, name, None)
    try:
        return None if method is None else method()
    except (NotImplementedError, AttributeError):
        return None
