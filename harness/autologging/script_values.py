"""What the script logs itself, before its run has begun and in it: each value once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.metrics.values import LoggedValues
from harness.training.periodic_logger import PeriodicLogger


class OwnValues:
    """The script's own metrics and parameters, which are whole; rank zero's count.

    Effects: not collective; main thread; nothing on disk but by the logger.

    Attributes:
        early_params: what was logged before there was a run.
    """

    def __init__(self) -> None:
        self._logger: PeriodicLogger | None = None
        self._values = LoggedValues(self._say)
        self._early_metrics: list[tuple[Mapping[str, float], int | None]] = []
        # The run alone knows how silent it is to be.
        self._early_lines: list[str] = []
        self.early_params: dict[str, Any] = {}

    def begin(self, logger: PeriodicLogger) -> None:
        """There is a run, which has had `early_params`: it gets the metrics too."""
        self._logger = logger
        for numbers, step in self._early_metrics:
            logger.record(numbers, step)
        for line in self._early_lines:
            logger.say(line)
        self._early_metrics.clear()
        self._early_lines.clear()

    def log(self, values: Mapping[str, Any], step: Any) -> None:
        """Metrics. What is no number is left out, which is said once for each name."""
        numbers, whole_step = self._values.numbers(values), self._values.step(step)
        if self._logger is None:
            self._early_metrics.append((numbers, whole_step))
        else:
            self._logger.record(numbers, whole_step)

    def _say(self, line: str) -> None:
        line = f"harness: autolog: {line}"
        if self._logger is None:
            self._early_lines.append(line)
        else:
            self._logger.say(line)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters."""
        if self._logger is None:
            self.early_params.update(values)
        else:
            self._logger.log_params(values)
