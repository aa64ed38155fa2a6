"""The learning rates as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class LearningRates:
    """Those of the optimizers' groups: ``train/lr``, or ``train/lr/group<n>`` where they differ.

    Of several models: ``train/lr/<model>``, or ``train/lr/<model>/group<n>``.

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
    rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
    if len(set(rates)) == 1:
        yield name, rates[0]
        return
    yield from ((f"{name}/group{index}", rate) for index, rate in enumerate(rates))
