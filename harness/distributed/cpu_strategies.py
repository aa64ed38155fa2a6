"""Run every strategy on a CPU, for debugging, tests and laptops.

On a CPU accelerate silently uses DDP in place of FSDP, and in place of DeepSpeed with ``ACCELERATE_USE_CPU`` (seen with
accelerate 1.15.0, deepspeed 0.19.8, torch 2.13.0).
"""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    ParallelismConfig,
    TorchDynamoPlugin,
)


def prepare_deepspeed() -> None:
    """Select DeepSpeed's CPU backend, without compiling an extension."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    # With this variable accelerate would run DDP.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    import deepspeed.ops

    # Otherwise the first start builds a C++ extension, which takes 27 s and needs ninja and g++.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prepare_fsdp(
    mixed_precision: str, init: InitProcessGroupKwargs, plugin: FullyShardedDataParallelPlugin | None = None
) -> None:
    """Create the state of the next `Accelerator()` with FSDP in place of DDP, in the requested version.

    Accelerate's state is a singleton that an `Accelerator` uses if it exists. This function calls its constructor and
    then corrects a few fields; it replaces no function of accelerate.

    `mixed_precision` is accelerate's name: no, bf16 or fp16. The default plugin is created from the environment of
    `accelerate launch`.

    Effects: collective: creates the process group and blocks until it exists; main thread; changes two environment
    variables of FSDP1; nothing on disk.
    """
    version = os.environ.get("FSDP_VERSION", "1") if plugin is None else str(plugin.fsdp_version)
    if version == "1":
        # By default `accelerate launch` requests that only rank 0 loads the weights and FSDP1 broadcasts them, which
        # works only on GPUs. Here each rank loads its own; see `harness.distributed.broadcast.broadcast_weights`.
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
        return  # a single process has nothing to shard
    if mixed_precision != "no":
        plugin.set_mixed_precision(mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if plugin.fsdp_version == 1:
        # FSDP1 compares it with torch.cpu.current_device(), which has no index.
        state.device = PartialState._shared_state["device"] = torch.device("cpu")
