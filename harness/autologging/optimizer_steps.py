"""Which of a script's optimizers step, and which of them checkpoints are of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.autologging.run_opener import AutologState
from harness.autologging.script import Choice, Prepared, raw
from harness.training.periodic_logger import PeriodicLogger


class Steps:
    """Watches all optimizers, until `close`: those that are wrapped, or step within backward, too.

    Effects: `attend` is collective: every rank calls it alike, between steps; the rest is not. Main thread.

    Args:
        logger: of the run.
        prepared: what the script has prepared.
        memory: of the run.
        choice: what checkpoints are of as training begins; None: there are none.
        stepped: called behind each step.
        say_once: a line for the user, with what to do about it.

    Attributes:
        are_seen: whether steps are told of: an optimizer that is not torch's tells nobody.
        another: number, from 1, of one that has stepped and was prepared since, for the model that checkpoints are of;
            0: none has.
    """

    def __init__(
        self,
        logger: PeriodicLogger,
        prepared: Prepared,
        memory: AutologState,
        choice: Choice | None,
        stepped: Callable[[], None],
        say_once: Callable[[str], None],
    ) -> None:
        self._logger = logger
        self._prepared = prepared
        self._memory = memory
        self._model: nn.Module | None = None if choice is None else choice.model
        # Those that checkpoints were of, in order.
        self._known = [] if choice is None or choice.optimizer is None else [raw(choice.optimizer)]
        self._another: Any = None
        self._stepped = stepped
        self._say_once = say_once
        self.are_seen = isinstance(raw(prepared.optimizers[0]), torch.optim.Optimizer)
        self._hook = register_optimizer_step_post_hook(self._after)

    def _after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._known and optimizer is self._known[-1]:
            self._stepped()  # which is nearly every step
            return
        if self._prepared.number_of(optimizer) is None:
            return  # of something else that the script trains beside
        self._stepped()
        if self._known and self._prepared.steps(optimizer, self._model):
            self._another = optimizer

    @property
    def another(self) -> int:
        """See above."""
        found = None if self._another is None else self._prepared.number_of(self._another)
        return 0 if found is None else found + 1

    def attend(self, another: int) -> None:
        """Have checkpoints be of the optimizer that steps now, or of the model alone where several do in turn.

        Args:
            another: as the attribute gave it, on any rank.
        """
        self._another = None
        number = another - 1
        optimizer = raw(self._prepared.optimizers[number])
        if optimizer in self._known:
            self._known.clear()
            self._logger.replace_optimizer(None)
            self._say_once("several optimizers step in turn for the one model: checkpoints hold the model alone")
            return
        self._known.append(optimizer)
        self._memory.optimizer = number
        self._logger.replace_optimizer(self._prepared.optimizers[number], self._prepared.scheduler_of(optimizer))
        self._say_once(
            f"another optimizer steps from here on ({type(optimizer).__name__}): checkpoints hold its state, and a run "
            "cannot go on from them"
        )

    def close(self) -> None:
        """Watch no longer."""
        self._hook.remove()
