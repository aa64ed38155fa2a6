"""What a CPU needs so that every strategy runs on it, as it does on GPUs.

Stock accelerate ignores an FSDP plugin on a CPU and uses DDP without a word, and takes
``ACCELERATE_USE_CPU`` with DeepSpeed for plain DDP. For debugging, for tests and for the laptop we
want the strategy that was asked for. Measured with accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0.
"""

from __future__ import annotations

import os
from itertools import chain

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    TorchDynamoPlugin,
)
from torch import nn

from harness.distributed.buffers import broadcast


def prepare_deepspeed() -> None:
    """Let DeepSpeed start on this CPU: its CPU backend, and no compiler at start."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # With this variable accelerate would take the run for plain DDP.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed.ops

    # Otherwise a C++ extension is built at the first start: 27 s, and it needs ninja and g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare_fsdp(
    mixed_precision: str, init: InitProcessGroupKwargs, plugin: FullyShardedDataParallelPlugin | None = None
) -> None:
    """Make the state that `Accelerator()` will find, with FSDP in it instead of DDP: the version that was asked for.

    Accelerate's state is a singleton that an `Accelerator` takes as it is found, so nothing of
    accelerate is replaced: the state is made first, by its own constructor, and a few fields corrected.

    Effects: collective, it makes the process group, for which it waits; main thread; two environment variables of
    FSDP1's stay changed; nothing on disk.

    Args:
        mixed_precision: accelerate's name: no, bf16 or fp16.
        init: what the process group is made with.
        plugin: as somebody has made it; None: of the environment that `accelerate launch` gives.
    """
    version = os.environ.get("FSDP_VERSION", "1") if plugin is None else str(plugin.fsdp_version)
    if version == "1":
        # FSDP1 sends rank zero's weights to the others on GPUs alone, and `accelerate launch` asks for it by default,
        # as for loading them on rank zero only. Here each rank makes or loads its own; see `send_weights`.
        os.environ |= {"FSDP_SYNC_MODULE_STATES": "false", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}
    plugin = plugin or FullyShardedDataParallelPlugin()
    uses_mesh = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    state = AcceleratorState(
        mixed_precision=mixed_precision,
        cpu=True,
        dynamo_plugin=TorchDynamoPlugin(),
        fsdp_plugin=plugin,
        parallelism_config=ParallelismConfig() if uses_mesh else None,
        _from_accelerator=True,
        **init.to_kwargs(),
    )
    if state.distributed_type != DistributedType.MULTI_CPU:
        return  # a single process: there is nothing to shard
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if plugin.fsdp_version == 1:
        # FSDP1 compares it with what torch.cpu.current_device() gives, which has no number.
        state.device = PartialState._shared_state["device"] = torch.device("cpu")


def send_weights(model: nn.Module) -> None:
    """Give all ranks rank zero's weights and buffers, as FSDP1 does on GPUs and DDP anywhere, before it is wrapped.

    Effects: collective on the default group; main thread; blocks; nothing on disk.

    Args:
        model: not prepared yet.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        broadcast(name, tensor)
