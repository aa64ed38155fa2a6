"""The nodes of a job: which ranks are on each, and with which GPUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# The number of a node in torch's elastic agent (of `accelerate launch` and `torchrun`) and in SLURM.
_NODE_VARIABLES = ("GROUP_RANK", "SLURM_NODEID")


@dataclass(frozen=True)
class NodePlace:
    """The place of one rank.

    Args:
        host: name of the machine.
        group: the launcher's number of the node; empty if it has none, so that nodes differ by host alone.
        gpu: UUID of the rank's GPU; None if it has none that NVML knows.
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
        ranks: on this node, ascending.
        gpus: UUIDs of their GPUs, in the order of ranks, each once.
    """

    index: int
    host: str
    ranks: tuple[int, ...]
    gpus: tuple[str, ...]


def find_place(device: torch.device, environment: Mapping[str, str] = os.environ) -> NodePlace:
    """Return the place of this rank."""
    group = next((environment[name] for name in _NODE_VARIABLES if name in environment), "")
    return NodePlace(socket.gethostname(), group, _uuid_of(device))


def _uuid_of(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    # Not the index: CUDA_VISIBLE_DEVICES renumbers torch's devices, and not NVML's.
    return str(torch.cuda.get_device_properties(device).uuid)


def nodes_of(places: Sequence[NodePlace]) -> list[Node]:
    """Group ranks by node.

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
