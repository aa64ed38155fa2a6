"""What the script logs itself, before its run has begun and in it: each value once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from harness.errors import MetricError
from harness.periodic import PeriodicLogger


class OwnValues:
    """The script's own metrics and parameters, which are whole; rank zero's count.

    Effects: not collective; main thread; nothing on disk but by the logger.

    Args:
        say_once: a line for the user.

    Attributes:
        early_params: what was logged before there was a run.
    """

    def __init__(self, say_once: Callable[[str], None]) -> None:
        self._say_once = say_once
        self._logger: PeriodicLogger | None = None
        self._early_metrics: list[tuple[Mapping[str, float], int | None]] = []
        self._left_out: dict[str, str] = {}
        self.early_params: dict[str, Any] = {}

    def begin(self, logger: PeriodicLogger) -> None:
        """There is a run, which has had `early_params`: it gets the metrics too."""
        self._logger = logger
        for values, step in self._early_metrics:
            self.log(values, step)
        self._early_metrics.clear()
        self._say_left_out(self._left_out)

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Metrics. What is no number is left out, which is said once for each name."""
        numbers: dict[str, float] = {}
        for name, value in values.items():
            if (number := _number(value)) is not None:
                numbers[str(name)] = number
            elif name not in self._left_out:
                self._left_out[name] = f"harness: autolog: {name} is left out: {_kind(value)} is no number"
                self._say_left_out([name])
        if not numbers:
            return
        if self._logger is None:
            self._early_metrics.append((numbers, step))
            return
        for name, number in numbers.items():
            try:
                self._logger.record({name: number}, step)
            except MetricError as error:
                self._say_once(f"a metric of the script is left out: {error}")

    def _say_left_out(self, names: Iterable[str]) -> None:
        # The run alone knows how silent it is to be.
        if self._logger is not None:
            for name in names:
                self._logger.say(self._left_out[name])

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters."""
        if self._logger is None:
            self.early_params.update(values)
        else:
            self._logger.log_params(values)


def _number(value: Any) -> float | None:
    """A value that is one number, or None."""
    if isinstance(value, (bool, int, float)):
        return float(value)
    if isinstance(value, torch.Tensor):
        return float(value.item()) if value.numel() == 1 else None
    try:
        return float(value.item()) if getattr(value, "size", None) == 1 else None
    except (AttributeError, TypeError, ValueError):
        return None


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
