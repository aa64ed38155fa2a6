"""What a loop logs, from a batch's values to a window's reduced ones: training's, evaluation's, and the gauges.

log, update   ->  sums and metric objects of what is running: training, or an evaluation
flush         ->  the reduction of training's sums begins
collect       ->  ... is read, by then at no wait, and told
end_evaluation -> evaluation's own, reduced and read at once
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from harness.distributed import strategies
from harness.distributed.collectives import Collectives
from harness.metrics import step_timer
from harness.metrics.reducer import Reduced, Reducer, WeightedSums
from harness.metrics.torchmetrics_sync import compute_over_ranks, each_metric
from harness.metrics.values import LoggedValues

if TYPE_CHECKING:
    import torchmetrics


class MetricAggregator:
    """Takes what is logged, and reduces it window by window.

    Effects: `flush`, `collect` and `end_evaluation` are collective; main thread; nothing on disk.

    Args:
        device: of the metric objects and the memory gauge.
        reducer: for this alone.
        rates: the learning rates as metrics.
        told: called with each reduced window and its step, on every rank alike.
        values: converts what is logged, and says once what is left out.

    Attributes:
        timer: of the steps.
        poll: sends a window off whose values have come from the device meanwhile.
    """

    def __init__(
        self,
        device: torch.device,
        reducer: Reducer,
        rates: Callable[[], dict[str, float]],
        told: Callable[[Mapping[str, float], int], None],
        values: LoggedValues,
    ) -> None:
        self._device = device
        self._reducer = reducer
        self._rates = rates
        self._told = told
        self._train = WeightedSums(values)
        self._eval = WeightedSums(values)
        # What log() adds to: training's sums, evaluation's, or nothing (a batch that does not count).
        self._target: WeightedSums | None = self._train
        self._objects: dict[str, torchmetrics.Metric] = {}
        self._rates_of_window: dict[str, float] = {}
        self._flushed_at_step: int | None = None
        self.timer = step_timer.StepTimer()
        self.poll = reducer.poll

    @property
    def is_waiting(self) -> bool:
        """Whether `poll` is to be called at the next step."""
        return self._reducer.is_waiting

    def log(self, values: Mapping[str, Any], weight: float) -> None:
        """See `PeriodicLogger.log`."""
        if self._target is not None:
            self._target.add(values, weight)

    def update(self, metrics: Mapping[str, torchmetrics.Metric], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `PeriodicLogger.update`."""
        single = each_metric(metrics)
        for name, metric in single.items():
            if name not in self._objects:
                self._objects[name] = metric.to(self._device)
        if self._target is not None:
            for metric in single.values():
                metric.update(*args, **kwargs)

    def evaluating(self, *, counts: bool) -> None:
        """A batch of an evaluation runs: what is logged is the evaluation's, or nobody's."""
        self._target = self._eval if counts else None

    def training(self) -> None:
        """What is logged is training's again."""
        self._target = self._train

    def partial(self) -> dict[str, tuple[float, float]]:
        """Sums and weights of training that no reduction has had."""
        return self._train.partial()

    def put_back(self, partial: Mapping[str, tuple[float, float]]) -> None:
        """Go on from what `partial` gave."""
        self._train.put_back(partial)

    def flush(self, step: int, *, wait: bool) -> None:
        """Start the reduction of training's sums; read it now, or at the next one."""
        # Once for each step, though a window and a checkpoint may end at it.
        self._rates_of_window = {} if self._flushed_at_step == step else self._rates()
        self._flushed_at_step = step
        self._reducer.start(self._train, step, self._gauges())
        if wait:
            self.collect()

    def collect(self) -> None:
        """Finish the reduction that was started last: by now the other ranks have started it too."""
        reduced = self._reducer.finish()
        if reduced is not None:
            self._told(_values(reduced) | self._rates_of_window, reduced.step)

    def collect_what_is_there(self) -> None:
        """The same for a rank that ends alone: not collective, waits for nobody."""
        if self._reducer.is_there:
            self.collect()

    def end_evaluation(self, step: int, collectives: Collectives) -> Mapping[str, float]:
        """Reduce and tell the evaluation's sums; what its metric objects give is returned."""
        self._rates_of_window = {}
        self._reducer.start(self._eval, step, self._gauges())
        self.collect()
        values = compute_over_ranks(collectives, self._objects)
        self._objects = {}
        return values

    def _gauges(self) -> dict[str, float]:
        return {**self.timer.take(), "memory_bytes": strategies.memory_bytes(self._device)}


def _values(reduced: Reduced) -> dict[str, float]:
    values = dict(reduced.values)
    if any(reduced.gauges["steps_per_s"]):
        values |= step_timer.over_ranks(reduced.gauges)
    return values
