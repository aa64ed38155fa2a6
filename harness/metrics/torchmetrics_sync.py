"""Merge the states of torchmetrics objects over all ranks, and compute each once.

torchmetrics' own synchronisation gathers tensor by tensor on the default group, and hangs if a rank has no state of
some kind (it had no sample). Merging whole states has no such requirement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from harness.errors import MetricError
from harness.metrics.values import as_number

if TYPE_CHECKING:
    import torchmetrics

    from harness.distributed.collectives import Collectives


def each_metric(metrics: Mapping[str, Any]) -> dict[str, torchmetrics.Metric]:
    """Flatten collections to ``name/part`` -> object."""
    single: dict[str, torchmetrics.Metric] = {}
    for name, metric in metrics.items():
        if hasattr(metric, "compute_groups"):  # a MetricCollection, detected without importing torchmetrics
            single |= {f"{name}/{part}": found for part, found in metric.items(copy_state=False)}
        else:
            single[name] = metric
    return single


def compute_over_ranks(collectives: Collectives, metrics: Mapping[str, torchmetrics.Metric]) -> dict[str, float]:
    """Compute each object from the updates of all ranks, and reset it; return name -> value.

    An object that computes several values gives ``name/key`` -> value. All ranks pass the same names.

    Effects: collective; main thread; blocks until all ranks call it; nothing on disk.

    Raises:
        MetricError: if an object computes something that is not a number.
    """
    if not metrics:
        return {}
    mine = {name: _to_host(metric.metric_state) for name, metric in metrics.items()}
    by_rank = collectives.all_gather("torchmetrics states", mine)
    values: dict[str, float] = {}
    for name, metric in metrics.items():
        merged = metric.clone().cpu()
        merged.sync_on_compute = False
        _merge(merged, [states[name] for states in by_rank])
        values |= _numbers(name, merged.compute())
        metric.reset()
    return values


def _merge(metric: torchmetrics.Metric, states: list[dict[str, Any]]) -> None:
    for name, reduce in metric._reductions.items():
        parts = [state[name] for state in states]
        if isinstance(parts[0], list):
            setattr(metric, name, [tensor for part in parts for tensor in part])
        elif reduce is None:
            # As in torchmetrics: one rank's state is unchanged, several are stacked for `compute`.
            setattr(metric, name, parts[0] if len(parts) == 1 else torch.stack(parts))
        else:
            setattr(metric, name, cast(Callable[[Tensor], Tensor], reduce)(torch.stack(parts)))
    metric._update_count = max(1, metric._update_count)
    metric._computed = None


def _to_host(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: [tensor.detach().cpu() for tensor in value] if isinstance(value, list) else value.detach().cpu()
        for name, value in state.items()
    }


def _numbers(name: str, value: Any) -> dict[str, float]:
    if isinstance(value, Mapping):
        return {key: number for part, item in value.items() for key, number in _numbers(f"{name}/{part}", item).items()}
    if isinstance(value, Tensor) and value.numel() != 1:
        raise MetricError(f"{name}: must compute one number, gives shape {tuple(value.shape)}; average it first")
    if (number := as_number(value)) is None:
        raise MetricError(f"{name}: must compute one number, gives a {type(value).__name__}")
    return {name: number}
