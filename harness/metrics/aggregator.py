"""Aggregate a loop's metrics from the values of a batch to the reduced values of a window.

log, update      add to the sums and metric objects of training, or of the running evaluation
flush            starts the reduction of training's sums
collect          finishes it, one window later, when every rank has started it and no wait is expected
reduce_evaluation, compute_objects
                 reduce the evaluation's sums and metric objects at once
publish          updates the latest values and writes them to the run
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from harness.distributed.collectives import Collectives
from harness.distributed.topology import memory_bytes
from harness.metrics import step_timer
from harness.metrics.learning_rates import LearningRates
from harness.metrics.reducer import Reduced, Reducer, WeightedSums
from harness.metrics.torchmetrics_sync import compute_over_ranks, each_metric
from harness.metrics.values import LoggedValues

if TYPE_CHECKING:
    import torchmetrics


class MetricSink(Protocol):
    """The run that reduced metrics are written to. `RunRecorder` implements it."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write metrics by optimizer step."""

    def log_recorded(self, values: Mapping[str, float], step: int) -> None:
        """Write metrics by a step that the script counts itself."""


class MetricWindow(NamedTuple):
    """A window's reduced values and the optimizer step at its end; the same on every rank."""

    values: Mapping[str, float]
    step: int


class MetricAggregator:
    """Aggregate logged values by window, over steps and ranks, and publish the result.

    Effects: `flush`, `collect`, `reduce_evaluation` and `compute_objects` are collective; main thread; only the sink
    writes to disk.

    Args:
        device: device of the metric objects and of the memory gauge.
        reducer: used by this object alone.
        latest: filled with the latest value of each metric.

    Attributes:
        timer: times the optimizer steps.
        rates: learning rates, added to each window of training.
        withholds: whether published values wait for `log_withheld`, during an evaluation within an epoch that may not
            be logged.
    """

    def __init__(
        self,
        device: torch.device,
        reducer: Reducer,
        values: LoggedValues,
        sink: MetricSink,
        latest: dict[str, float],
    ) -> None:
        self._device = device
        self._reducer = reducer
        self._values = values
        self._sink = sink
        self._train = WeightedSums(values)
        self._eval = WeightedSums(values)
        # `log` adds to training's sums, the evaluation's, or none (a batch of repeated samples).
        self._target: WeightedSums | None = self._train
        self._objects: dict[str, torchmetrics.Metric] = {}
        self._rates_of_window: dict[str, float] = {}
        self._flushed_at_step: int | None = None
        self._recorded_names: set[str] = set()
        self._withheld: dict[str, tuple[float, int]] = {}
        self.timer = step_timer.StepTimer()
        self.rates = LearningRates()
        self.latest = latest
        self.withholds = False

    # --------------------------------------------------------------------- within a window

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

    def begin_evaluation_batch(self, *, counts: bool) -> None:
        """Direct `log` to the evaluation's sums, or to none if the batch repeats samples."""
        self._target = self._eval if counts else None

    def resume_training(self) -> None:
        """Direct `log` to training's sums again."""
        self._target = self._train

    def partial(self) -> dict[str, tuple[float, float]]:
        """Return training's sums and weights that are not reduced yet, for a checkpoint."""
        return self._train.partial()

    def restore(self, partial: Mapping[str, tuple[float, float]], latest: Mapping[str, float]) -> None:
        """Restore what `partial` returned and the latest values of a checkpoint."""
        self._train.restore(partial)
        self.latest.update(latest)

    # ------------------------------------------------------------------------- reductions

    @property
    def is_waiting(self) -> bool:
        """Whether `poll` must be called at the next step."""
        return self._reducer.is_waiting

    def poll(self) -> None:
        """Send a window whose values have arrived from the device."""
        self._reducer.poll()

    def flush(self, step: int) -> None:
        """Start the reduction of training's sums. The previous one must be collected."""
        # Rates are published once for each step, though both a window and a checkpoint may end at it.
        self._rates_of_window = {} if self._flushed_at_step == step else self.rates.now()
        self._flushed_at_step = step
        self._reducer.start(self._train, step, self._gauges())

    def collect(self) -> MetricWindow | None:
        """Finish the reduction that was started last; return None without one."""
        reduced = self._reducer.finish()
        return None if reduced is None else MetricWindow(_values(reduced) | self._rates_of_window, reduced.step)

    def collect_without_waiting(self) -> MetricWindow | None:
        """Finish the reduction if it is complete on this rank, for a rank that ends alone. Not collective."""
        return self.collect() if self._reducer.is_complete else None

    def reduce_evaluation(self, step: int) -> MetricWindow | None:
        """Reduce the evaluation's sums at once."""
        self._rates_of_window = {}
        self._reducer.start(self._eval, step, self._gauges())
        return self.collect()

    def compute_objects(self, collectives: Collectives) -> Mapping[str, float]:
        """Compute the evaluation's metric objects over all ranks. Collective."""
        objects, self._objects = self._objects, {}
        return compute_over_ranks(collectives, objects)

    def _gauges(self) -> dict[str, float]:
        return {**self.timer.pop(), "memory_bytes": memory_bytes(self._device)}

    # ------------------------------------------------------------------------- publication

    def publish(self, values: Mapping[str, float], step: int) -> None:
        """Publish values that are the same on every rank, except names that the script records itself."""
        if self._recorded_names:
            values = {name: value for name, value in values.items() if name not in self._recorded_names}
        if not values:
            return
        self.latest.update(values)
        if self.withholds:
            self._withheld.update({key: (value, step) for key, value in values.items()})
        else:
            self._sink.log_metrics(values, step)

    def report(self, values: Mapping[str, Any], step: int) -> None:
        """See `PeriodicLogger.report`."""
        self.publish(self._values.numbers(values), step)

    def record(self, values: Mapping[str, Any], step: int, own_step: Any) -> None:
        """Publish rank zero's values; see `PeriodicLogger.record`. `own_step` is None if the script counts none."""
        if not (numbers := self._values.numbers(values)):
            return
        own_step = self._values.step(own_step)
        self._recorded_names.update(numbers)
        self.latest.update(numbers)
        if own_step is None:
            self._sink.log_metrics(numbers, step)
        else:
            self._sink.log_recorded(numbers, own_step)

    def log_withheld(self) -> None:
        """Write the newest withheld value of each metric."""
        withheld, self._withheld = self._withheld, {}
        for step in sorted({step for _, step in withheld.values()}):
            self._sink.log_metrics({key: value for key, (value, at) in withheld.items() if at == step}, step)


def _values(reduced: Reduced) -> dict[str, float]:
    values = dict(reduced.values)
    if any(reduced.gauges["steps_per_s"]):
        values |= step_timer.over_ranks(reduced.gauges)
    return values
