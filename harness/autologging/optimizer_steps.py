"""Observe which of a script's optimizers step, and select the one that checkpoints contain."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.autologging.autolog_state import AutologState
from harness.autologging.context import UserMessages
from harness.autologging.script import CheckpointContent, Prepared, raw
from harness.training.periodic_logger import PeriodicLogger


class OptimizerSteps:
    """Classifies the steps of all optimizers of the process, and changes the one that checkpoints contain.

    Effects: `use_other` is collective: every rank calls it alike, between steps; the rest is not. Main thread.

    Args:
        content: what checkpoints contain as training begins; None if there are none.

    Attributes:
        are_observed: whether steps are observed; an optimizer that is not torch's runs no hooks.
    """

    def __init__(
        self,
        logger: PeriodicLogger,
        prepared: Prepared,
        content: CheckpointContent | None,
        state: AutologState,
        messages: UserMessages,
    ) -> None:
        self._logger = logger
        self._prepared = prepared
        self._state = state
        self._messages = messages
        self._model: nn.Module | None = None if content is None else content.model
        # The optimizers that checkpoints contained, in order.
        self._known = [] if content is None or content.optimizer is None else [raw(content.optimizer)]
        self._other: Any = None
        self.are_observed = isinstance(raw(prepared.optimizers[0]), torch.optim.Optimizer)

    def is_of_training(self, optimizer: Any) -> bool:
        """Whether an optimizer that has just stepped belongs to this training."""
        if self._known and optimizer is self._known[-1]:
            return True  # nearly every step
        if self._prepared.number_of(optimizer) is None:
            return False  # of something else that the script trains
        if self._known and self._prepared.steps(optimizer, self._model):
            self._other = optimizer
        return True

    @property
    def other(self) -> int:
        """The number, from 1, of an optimizer that steps in place of the one in checkpoints; 0 if none."""
        number = None if self._other is None else self._prepared.number_of(self._other)
        return 0 if number is None else number + 1

    def use_other(self, other: int) -> None:
        """Have checkpoints contain the optimizer that steps now, or the model alone if several step in turn.

        Args:
            other: value of the attribute `other`, the same on every rank.
        """
        self._other = None
        number = other - 1
        optimizer = raw(self._prepared.optimizers[number])
        if optimizer in self._known:
            self._known.clear()
            self._logger.replace_optimizer(None)
            self._messages.say_once(
                "several optimizers step in turn for the one model: checkpoints contain the model alone"
            )
            return
        self._known.append(optimizer)
        self._state.optimizer = number
        self._logger.replace_optimizer(self._prepared.optimizers[number], self._prepared.scheduler_of(optimizer))
        self._messages.say_once(
            f"another optimizer steps from here on ({type(optimizer).__name__}): checkpoints contain its state, and a "
            "run cannot be resumed from them"
        )
