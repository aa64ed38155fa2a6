"""The full state on rank zero, gathered by the strategies' own means: what the engine is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.tensor import DTensor

from harness.checkpoint.format.names import NamedState, named_state
from harness.errors import CheckpointError


@dataclass
class GatheredState:
    """Logical tensors in host memory, their own copies; empty on all ranks but zero.

    Args:
        model: name -> tensor.
        aliases: tied name -> the name under which it stands in `model`.
        optimizer: ``<kind>.<name>`` -> tensor, such as ``exp_avg.fc.weight``, ``master.fc.weight``.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    optimizer: dict[str, Tensor] = field(default_factory=dict)


def gather_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    *,
    has_groups: bool = True,
) -> GatheredState:
    """Gather weights, buffers and optimizer state.

    Effects: collective on the default group (sharded strategies); main thread, between steps; blocks
    until all is copied; nothing on disk.

    Args:
        accelerator: which ranks and which strategy.
        model: the prepared model.
        optimizer: the prepared optimizer, or None to leave its state out.
        has_groups: false: leave DeepSpeed's optimizer state out.

    Raises:
        CheckpointError: if the state cannot be named, or a strategy cannot give it.
    """
    _reshard(model)
    state = named_state(model)
    keep = _Keeper(accelerator.is_main_process)
    gathered = GatheredState(aliases=state.aliases)
    with torch.no_grad():
        if accelerator.distributed_type == DistributedType.DEEPSPEED and not has_groups:
            optimizer = None  # DeepSpeed's own accessors fail where there are several parameter groups
        gather = _torch_gatherer
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            gather = _zero_gatherer
        elif isinstance(model, FullyShardedDataParallel):
            gather = _fsdp1_gatherer
        gather(gathered, state, model, optimizer, keep)
    return gathered


def _reshard(model: nn.Module) -> None:
    """Make an FSDP2 model hold its sharded parameters again.

    After a forward without a backward (an evaluation) its root keeps the unsharded ones, which are other
    tensors than those that the optimizer updates.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class _Keeper:
    """Copies a tensor to host memory of its own on rank zero, and nothing elsewhere."""

    def __init__(self, is_main_process: bool) -> None:
        self._is_main_process = is_main_process

    def __call__(self, into: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if self._is_main_process:
            into[name] = full.detach().to("cpu", copy=True).contiguous()


def _torch_gatherer(
    gathered: GatheredState,
    state: NamedState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    keep: _Keeper,
) -> None:
    """Single process, DDP, FSDP2, HSDP: parameters and moments are tensors or DTensors."""
    for name, tensor in {**state.parameters, **state.buffers}.items():
        keep(gathered.model, name, tensor)
    if optimizer is None:
        return
    inner = getattr(optimizer, "optimizer", optimizer)
    names = {id(parameter): name for name, parameter in state.parameters.items()}
    for group in inner.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            for kind, value in inner.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    keep(gathered.optimizer, f"{kind}.{name}", value)
                elif isinstance(value, (int, float)):
                    keep(gathered.optimizer, f"{kind}.{name}", torch.tensor(value))
                elif value is not None:
                    raise CheckpointError(
                        f"{type(inner).__name__}: cannot save its state {kind!r} of {name}: a {type(value).__name__}, "
                        "not a tensor or a number; use checkpoint.save_weights_only, or another optimizer"
                    )


def _fsdp1_gatherer(
    gathered: GatheredState,
    state: NamedState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    keep: _Keeper,
) -> None:
    """FSDP1, by what torch has for it, all of which is collective."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        ours = {id(parameter): name for name, parameter in state.parameters.items()}
        names = {clean_tensor_name(name): ours[id(parameter)] for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            keep(gathered.model, names[clean_tensor_name(name)], parameter)
    for name, buffer in state.buffers.items():
        keep(gathered.model, name, buffer)
    if optimizer is None:
        return
    whole = optimizer.state_dict()
    told: list[Any] = [None] * dist.get_world_size()
    # A rank may have nothing of what is trained.
    dist.all_gather_object(told, {kind for values in whole["state"].values() for kind in values})
    kinds = sorted(set().union(*told))
    # Each kind by itself: torch gathers one after another into the same memory, of which a CPU makes no copy.
    for kind in kinds:
        part = {number: {kind: values[kind]} for number, values in whole["state"].items()}
        found = FullyShardedDataParallel.optim_state_dict(model, optimizer, {**whole, "state": part})
        for name, values in found["state"].items():
            keep(gathered.optimizer, f"{kind}.{names[name]}", values[kind])


def _zero_gatherer(
    gathered: GatheredState,
    state: NamedState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    keep: _Keeper,
) -> None:
    """DeepSpeed ZeRO-1, 2, 3, through DeepSpeed's own accessors (each is collective)."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine: Any = model
    is_stage_3 = engine.zero_optimization_stage() == 3

    @contextmanager
    def whole(parameter: nn.Parameter) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters([parameter], enabled=is_stage_3):
            yield

    for name, parameter in state.parameters.items():
        with whole(parameter):
            keep(gathered.model, name, parameter)
    for name, buffer in state.buffers.items():
        keep(gathered.model, name, buffer)
    if optimizer is None:
        return
    inner = engine.optimizer.optimizer
    trained = {id(p) for group in _full_groups(engine, is_stage_3) for p in group}
    in_group = [name for name, parameter in state.parameters.items() if id(parameter) in trained]
    flat_state: dict[str, Any] = next(iter(inner.state.values()), {})
    kinds = [kind for kind, value in flat_state.items() if isinstance(value, Tensor) and value.ndim]
    for name in in_group:
        parameter = state.parameters[name]
        if parameter.dtype != torch.float32:
            keep(gathered.optimizer, f"master.{name}", _present(safe_get_full_fp32_param(parameter), name))
        for kind in kinds:
            moment = safe_get_full_optimizer_state(parameter, kind)
            keep(gathered.optimizer, f"{kind}.{name}", _present(moment, name))
        for kind, value in flat_state.items():
            if kind not in kinds and value is not None:
                keep(gathered.optimizer, f"{kind}.{name}", torch.as_tensor(value))


def _full_groups(engine: Any, is_stage_3: bool) -> list[list[nn.Parameter]]:
    """The 16-bit (or fp32) parameters that the ZeRO optimizer updates."""
    return list(engine.optimizer.fp16_groups if is_stage_3 else engine.optimizer.bit16_groups)


def _present(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise CheckpointError(f"{name}: DeepSpeed gave no optimizer state for it")
    return value
