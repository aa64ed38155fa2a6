"""The run's metrics on their way to it: the latest of each, and what waits until its epoch may be logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class MetricHistory:
    """Takes reduced metrics, which are the same on every rank.

    Effects: not collective; main thread; nothing on disk but by `log`.

    Args:
        latest: filled with the latest value of each metric.
        log: called with values and their step, when they are to be in the run.
        log_recorded: the same for values that a loop has recorded, whose step is of its own counting.

    Attributes:
        withholds: what is added now waits for `log_withheld`: an evaluation in an epoch that may not be logged.
    """

    def __init__(
        self,
        latest: dict[str, float],
        log: Callable[[Mapping[str, float], int], None],
        log_recorded: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self.latest = latest
        self.withholds = False
        self._log = log
        self._log_recorded = log_recorded
        self._recorded: set[str] = set()
        self._withheld: dict[str, tuple[float, int]] = {}

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Values of a step."""
        if self._recorded:
            values = {name: value for name, value in values.items() if name not in self._recorded}
        if not values:
            return
        self.latest.update(values)
        if self.withholds:
            self._withheld.update({key: (value, step) for key, value in values.items()})
        else:
            self._log(values, step)

    def record(self, values: Mapping[str, float], step: int, own_step: int | None) -> None:
        """Values of a loop's own, whose names `add` leaves to it from now on. Rank zero's alone.

        Args:
            values: name -> number.
            step: optimizer steps that are complete.
            own_step: of the loop's own counting; None: it counts none.
        """
        self._recorded.update(values)
        self.latest.update(values)
        if own_step is None:
            self._log(values, step)
        else:
            self._log_recorded(values, own_step)

    def log_withheld(self) -> None:
        """Log the newest of what was held back, as it is to be logged after all."""
        withheld, self._withheld = self._withheld, {}
        for step in sorted({step for _, step in withheld.values()}):
            self._log({key: value for key, (value, at) in withheld.items() if at == step}, step)
