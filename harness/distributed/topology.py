"""Describe the processes and hardware of a run, as seen from one rank."""

from __future__ import annotations

import functools
import os
import resource
import sys
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Topology:
    """The processes and hardware of a run, as seen from one rank.

    Args:
        strategy: single, ddp, fsdp1, fsdp2, hsdp, zero1, zero2 or zero3.
        device: this rank's device, such as ``cuda:0``.
        mixed_precision: fp32, bf16 or fp16.
    """

    strategy: str
    rank: int
    world_size: int
    num_nodes: int
    device: str
    device_name: str
    mixed_precision: str

    @property
    def run_facts(self) -> dict[str, str]:
        """The values that are the same on all ranks, as text for tags."""
        return {
            "strategy": self.strategy,
            "world_size": str(self.world_size),
            "num_nodes": str(self.num_nodes),
            "device": self.device.partition(":")[0],
            "device_name": self.device_name,
            "mixed_precision": self.mixed_precision,
        }


def strategy_of(accelerator: Accelerator) -> str:
    """Return the running strategy by its name in `harness launch --strategy`, or ``fsdp1``."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version == 1:
            return "fsdp1"
        mesh = accelerator.parallelism_config
        return "hsdp" if mesh is not None and mesh.dp_replicate_enabled else "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def topology_of(accelerator: Accelerator) -> Topology:
    """Return the processes and hardware of this run."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    return Topology(
        strategy=strategy_of(accelerator),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_nodes=max(1, accelerator.num_processes // max(1, local_size)),
        device=str(accelerator.device),
        device_name=_device_name(accelerator.device),
        mixed_precision=precision,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return device.type


def memory_bytes(device: torch.device) -> float:
    """Return the peak of memory allocated for tensors (CUDA), else the resident memory of this process, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform != "linux":
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return float(int(os.pread(_statm(), 256, 0).split()[1]) * _PAGE_BYTES)


@functools.cache
def _statm() -> int:
    """Open this process's memory figures, once, because each window reads them."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
