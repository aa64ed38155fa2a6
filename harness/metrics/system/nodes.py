"""Group the job's ranks and GPUs by node."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Node numbers of torch's elastic agent (`accelerate launch`, `torchrun`) and of SLURM.
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class NodePlace:
    """The node and the GPU of one rank.

    Args:
        group: the launcher's node number; empty without one, so that nodes differ by host alone.
        gpu: UUID of the rank's GPU; None without one that NVML supports.
    """

    host: str
    group: str
    gpu: str | None


@dataclass(frozen=True)
class Node:
    """One of the job's nodes.

    Args:
        index: from 0, in the order of the nodes' lowest ranks: rank zero is on node 0.
        ranks: on this node, ascending.
        gpus: distinct UUIDs of the ranks' GPUs, in the order of ranks.
    """

    index: int
    host: str
    ranks: tuple[int, ...]
    gpus: tuple[str, ...]


def find_place(device: torch.device, environment: Mapping[str, str] = os.environ) -> NodePlace:
    """Return this rank's node and GPU."""
    group = next((environment[name] for name in _NODE_VARIABLES if name in environment), "")
    return NodePlace(socket.gethostname(), group, _uuid_of(device))


def _uuid_of(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    # The index would not do: CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
    return str(torch.cuda.get_device_properties(device).uuid)


def nodes_of(places: Sequence[NodePlace]) -> list[Node]:
    """Group ranks by node; `places` is in the order of ranks."""
    ranks_on: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_on.setdefault((place.group, place.host), []).append(rank)
    nodes = []
    for index, ((_, host), ranks) in enumerate(ranks_on.items()):
        gpus = dict.fromkeys(gpu for rank in ranks if (gpu := places[rank].gpu) is not None)
        nodes.append(Node(index, host, tuple(ranks), tuple(gpus)))
    return nodes
