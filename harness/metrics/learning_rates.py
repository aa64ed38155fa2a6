"""The learning rates as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class LearningRates:
    """Those of the optimizers' groups: ``train/lr``, or ``train/lr/group<n>`` where they differ.

    Of several models: ``train/lr/<model>``, or ``train/lr/<model>/group<n>``.

    A group without a number for a rate has none here.

    Effects: not collective; main thread; nothing on disk.

    Attributes:
        optimizers: name of the model -> its optimizer; the name is empty where it is the only one.
    """

    def __init__(self) -> None:
        self.optimizers: Mapping[str, Any] = {}
        self._kept: dict[str, float] | None = None

    def keep(self) -> None:
        """Those of now are the epoch's, whatever its end does to them: a scheduler may step by epochs."""
        self._kept = self.now()

    def follow(self) -> None:
        """An epoch begins: they are the optimizer's again."""
        self._kept = None

    def now(self) -> dict[str, float]:
        """Name -> rate."""
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
    """A group's rate, which may be a tensor; None if it has no number for one (transformers' Adafactor: lr=None)."""
    try:
        return None if isinstance(rate, str) else float(rate)
    except (TypeError, ValueError, RuntimeError):
        return None
