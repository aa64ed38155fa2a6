"""When checkpoints are due by epochs and steps, and when early stopping ends the training.

All of it only counts: every rank counts the same steps, so all ranks decide alike. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Mode


@dataclass(frozen=True)
class Cadence:
    """Due every `every_n_epochs` epochs, every `every_n_steps` optimizer steps, both, or never."""

    every_n_epochs: int | None
    every_n_steps: int | None

    def is_due_after_epoch(self, num_epochs_done: int) -> bool:
        """Whether an event is due after the end of an epoch."""
        return self.every_n_epochs is not None and num_epochs_done % self.every_n_epochs == 0

    def is_due_after_step(self, num_steps_done: int, num_before: int | None = None) -> bool:
        """Whether an event is due after optimizer steps.

        Args:
            num_steps_done: the total.
            num_before: the total at the previous call, as a loop of several optimizers adds more than one step at once;
                None: one fewer.
        """
        return is_passed(self.every_n_steps, num_steps_done, num_before)


def is_passed(every_n: int | None, count: int, before: int | None = None) -> bool:
    """Whether a multiple of `every_n` is in the range above `before` (None: `count` - 1) up to `count`."""
    return every_n is not None and count // every_n > (count - 1 if before is None else before) // every_n


def is_better(value: float, best: float | None, mode: Mode) -> bool:
    """Whether `value` improves on `best`. NaN never does; any other value improves on None."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best if mode == "min" else value > best


class Patience:
    """Counts evaluations without improvement.

    Every rank feeds it the same reduced values, so every rank stops at the same epoch.
    """

    def __init__(self, mode: Mode, patience: int) -> None:
        self.mode = mode
        self.patience = patience
        self.best: float | None = None
        self.num_without_improvement = 0

    def is_exhausted_by(self, value: float) -> bool:
        """Record an evaluation's value; returns whether training should stop."""
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
