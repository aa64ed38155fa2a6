"""Decide when checkpoints are due by epochs and steps, and when early stopping ends the training.

All ranks decide alike without communication, because they count the same steps. Importing this never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Mode


@dataclass(frozen=True)
class Cadence:
    """An event that is due every n epochs, every n optimizer steps, both, or never."""

    every_n_epochs: int | None
    every_n_steps: int | None

    def is_due_after_epoch(self, num_epochs_done: int) -> bool:
        """Whether the event is due after the end of an epoch."""
        return self.every_n_epochs is not None and num_epochs_done % self.every_n_epochs == 0

    def is_due_after_step(self, num_steps_done: int, num_before: int | None = None) -> bool:
        """Whether the event is due after optimizer steps.

        A loop of several optimizers may add several steps at once, and passes the total before them as `num_before`.
        """
        return is_passed(self.every_n_steps, num_steps_done, num_before)


def is_passed(every_n: int | None, count: int, before: int | None = None) -> bool:
    """Whether a multiple of `every_n` is above `before` (default: `count` - 1) and at most `count`."""
    return every_n is not None and count // every_n > (count - 1 if before is None else before) // every_n


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether `value` improves on `best`. NaN never does; any other value improves on None."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if mode == "min" else value > best


class Patience:
    """Counts evaluations without improvement. All ranks pass the same reduced values, and so stop at the same epoch."""

    def __init__(self, mode: Mode, patience: int) -> None:
        self.mode = mode
        self.patience = patience
        self.best: float | None = None
        self.num_without_improvement = 0

    def is_exhausted_by(self, value: float) -> bool:
        """Record an evaluation's value and return whether training should stop."""
        if is_better(value, self.best, self.mode):
            self.best = value
            self.num_without_improvement = 0
        else:
            self.num_without_improvement += 1
        return self.num_without_improvement >= self.patience

    def state_dict(self) -> dict[str, float | int | None]:
        """Return the best value and the count."""
        return {"best": self.best, "num_without_improvement": self.num_without_improvement}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.best, self.num_without_improvement = state["best"], state["num_without_improvement"]
