"""Who is on which node, and which GPUs are the job's."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# What torch's elastic agent (below `accelerate launch` and `torchrun`) and SLURM call a node's number.
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class NodePlace:
    """Where one rank is.

    Args:
        host: name of the machine.
        group: the launcher's number of the node; empty: it gives none, and the host alone tells nodes apart.
        gpu: UUID of the rank's GPU; None: it has none that NVML knows.
    """

    host: str
    group: str
    gpu: str | None


@dataclass(frozen=True)
class Node:
    """One of the job's nodes.

    Args:
        index: counted from 0, in the order of their lowest ranks: rank zero is on node 0.
        host: name of the machine.
        ranks: that are on it, ascending.
        gpus: UUIDs of their GPUs, in the order of ranks; one that two ranks share is there once.
    """

    index: int
    host: str
    ranks: tuple[int, ...]
    gpus: tuple[str, ...]


def find_place(device: torch.device, environment: Mapping[str, str] = os.environ) -> NodePlace:
    """Where this rank is."""
    group = next((environment[name] for name in _NODE_VARIABLES if name in environment), "")
    return NodePlace(socket.gethostname(), group, _uuid_of(device))


def _uuid_of(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    # Indices would not do: CUDA_VISIBLE_DEVICES renumbers what torch sees, and not what NVML does.
    return str(torch.cuda.get_device_properties(device).uuid)


def nodes_of(places: Sequence[NodePlace]) -> list[Node]:
    """The nodes that the ranks are on.

    Args:
        places: of all ranks, in their order.
    """
    ranks_on: dict[tuple[str, str], list[int]] = {}
    for rank, place in enumerate(places):
        ranks_on.setdefault((place.group, place.host), []).append(rank)
    nodes = []
    for index, ((_, host), ranks) in enumerate(ranks_on.items()):
        gpus = dict.fromkeys(gpu for rank in ranks if (gpu := places[rank].gpu) is not None)
        nodes.append(Node(index, host, tuple(ranks), tuple(gpus)))
    return nodes
