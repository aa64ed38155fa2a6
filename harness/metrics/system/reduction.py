"""Reduce the figures of all nodes to metrics: each node's own, and one for the whole job.

The names are MLflow's. Its System metrics page shows names that begin with ``system/`` over wall-clock time, and puts
``system/node_<k>/<name>`` of all nodes into one chart (read from the page's code, 3.17.2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PREFIX = "system/"
# CPU time of the sampler's thread since its last report.
OWN_COST = "sampler_cpu_milliseconds"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Rule:
    """Define how a figure is reduced over several nodes or GPUs.

    Args:
        reduce: over all that have it.
        is_total: the result is a sum, which is meaningful only if all have reported.
        latest_only: the figure only grows, so the last of several readings counts, not the mean.
    """

    reduce: Callable[[Sequence[float]], float]
    is_total: bool = False
    latest_only: bool = False


_MEAN, _TOTAL = Rule(_mean), Rule(sum, is_total=True)
# For a resource that can run out: the node or GPU nearest to its limit.
_FULLEST, _LEAST = Rule(max), Rule(min)

# docs/guides/tracking.md shows this table.
RULES: Mapping[str, Rule] = {
    "cpu_utilization_percentage": _MEAN,
    "system_memory_usage_megabytes": _TOTAL,
    "system_memory_usage_percentage": _FULLEST,
    "disk_usage_megabytes": _TOTAL,
    "disk_usage_percentage": _FULLEST,
    "disk_available_megabytes": _LEAST,
    "network_receive_megabytes": Rule(sum, is_total=True, latest_only=True),
    "network_transmit_megabytes": Rule(sum, is_total=True, latest_only=True),
    "gpu_utilization_percentage": _MEAN,
    "gpu_memory_usage_megabytes": _TOTAL,
    "gpu_memory_usage_percentage": _FULLEST,
    "gpu_power_usage_watts": _TOTAL,
    "gpu_power_usage_percentage": _MEAN,
    OWN_COST: Rule(max),
}

_GPU = re.compile(r"gpu_\d+_")


def latest_only(name: str) -> bool:
    """Whether a figure only grows, so that the last of several readings counts."""
    return name in RULES and RULES[name].latest_only


def reduce(figures: Mapping[int, Mapping[str, float]], num_nodes: int, num_gpus: int) -> dict[str, float]:
    """Reduce the figures of all nodes and GPUs, by node and name, to one for the job.

    A total is left out if a node is missing, as it would look like a drop.
    """
    values: dict[str, list[float]] = {}
    for each in figures.values():
        for name, value in each.items():
            values.setdefault(_GPU.sub("gpu_", name), []).append(value)
    reduced = {}
    for name, found in values.items():
        rule = RULES[name]
        num_expected = num_gpus if name.startswith("gpu_") else num_nodes
        if not rule.is_total or len(found) == num_expected:
            reduced[name] = rule.reduce(found)
    return reduced


def metrics_of(
    reports: Mapping[int, Mapping[str, float]], known: Mapping[int, Mapping[str, float]], num_nodes: int, num_gpus: int
) -> dict[str, float]:
    """Return the metrics by their names in MLflow. With one node its figures have the plain names.

    Args:
        reports: node -> its figures, for nodes with a new report.
        known: node -> its last figures, for the reduction.
        num_nodes: of the job.
        num_gpus: of the job.
    """
    metrics: dict[str, float] = {}
    for node, figures in reports.items():
        prefix = PREFIX if num_nodes == 1 else f"{PREFIX}node_{node}/"
        metrics |= {prefix + name: value for name, value in figures.items()}
    return metrics | {PREFIX + name: value for name, value in reduce(known, num_nodes, num_gpus).items()}
