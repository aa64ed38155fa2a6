"""torchmetrics objects over all ranks: their states are exchanged and merged, then computed once.

torchmetrics' own synchronisation gathers tensor by tensor on the default group, and waits for ever
where one rank has no state of some kind (it had no sample). Merging whole states does not mind.
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
    """Collections taken apart: ``name/part`` -> object."""
    single: dict[str, torchmetrics.Metric] = {}
    for name, metric in metrics.items():
        if hasattr(metric, "compute_groups"):  # a MetricCollection, without importing torchmetrics for it
            single |= {f"{name}/{part}": found for part, found in metric.items(copy_state=False)}
        else:
            single[name] = metric
    return single


def compute_over_ranks(collectives: Collectives, metrics: Mapping[str, torchmetrics.Metric]) -> dict[str, float]:
    """Compute each object from what all ranks have updated it with, and reset it.

    Effects: collective; main thread; blocks until all ranks are here; nothing on disk.

    Args:
        collectives: carries the states.
        metrics: name -> object; the same names on every rank.

    Returns:
        name -> value; where an object gives several, ``name/key``.

    Raises:
        MetricError: if an object gives something that is not a number.
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
            # torchmetrics' own meaning of it: one rank's state as it is, several stacked for `compute`.
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
