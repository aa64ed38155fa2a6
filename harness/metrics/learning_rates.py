"""Log the optimizers' learning rates as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class LearningRates:
    """Read the learning rates of the optimizers' groups: ``train/lr``, or ``train/lr/group<n>`` where they differ.

    With several models: ``train/lr/<model>``, or ``train/lr/<model>/group<n>``. A group without a numeric rate is left
    out.

    Effects: not collective; main thread; nothing on disk.

    Attributes:
        optimizers: name of the model -> its optimizer; the name of an only optimizer is empty.
    """

    def __init__(self) -> None:
        self.optimizers: Mapping[str, Any] = {}
        self._kept: dict[str, float] | None = None

    def keep(self) -> None:
        """Freeze the current rates as the epoch's, as a scheduler that steps by epochs may change them at its end."""
        self._kept = self.now()

    def follow(self) -> None:
        """Read the optimizers' rates again, from the start of an epoch."""
        self._kept = None

    def now(self) -> dict[str, float]:
        """Return name -> rate."""
        if self._kept is not None:
            return self._kept
        return {name: rate for model, optimizer in self.optimizers.items() for name, rate in _rates(model, optimizer)}


def _rates(model: str, optimizer: Any) -> Iterator[tuple[str, float]]:
    name = f"train/lr/{model}" if model else "train/lr"
    found = [_number(group.get("lr")) for group in optimizer.param_groups]
    rates = {index: rate for index, rate in enumerate(found) if rate is not None}
    if len(set(rates.values())) == 1:
        yield name, next(iter(rates.values()))
        return
    yield from ((f"{name}/group{index}", rate) for index, rate in rates.items())


def _number(rate: Any) -> float | None:
    """Return a group's rate, which may be a tensor; None without a number (transformers' Adafactor has lr=None)."""
    try:
        return None if isinstance(rate, str) else float(rate)
    except (TypeError, ValueError, RuntimeError):
        return None
