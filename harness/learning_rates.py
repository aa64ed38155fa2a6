"""The learning rates as metrics."""

from __future__ import annotations

from typing import Any


class LearningRates:
    """Those of an optimizer's groups: ``train/lr``, or ``train/lr/group<n>`` where they differ.

    Effects: not collective; main thread; nothing on disk.

    Attributes:
        optimizer: whose they are; None: there are none.
    """

    def __init__(self) -> None:
        self.optimizer: Any = None
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
        if self.optimizer is None:
            return {}
        rates = [float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group]
        if len(set(rates)) == 1:
            return {"train/lr": rates[0]}
        return {f"train/lr/group{index}": rate for index, rate in enumerate(rates)}
