"""Tasks that go wrong in the ways that real ones do."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from harness.config.task import StepOutput
from harness.tasks import Digits

RANK = int(os.environ.get("RANK", "0"))


class Breaks(Digits):
    """On one rank, at one step: raises, is killed, is stopped, or waits for ever while rank 1 raises.

    ``kill once``: not again in ranks that a launcher has started anew.
    """

    def __init__(self, how: str, at: int = 10, rank: int = 1) -> None:
        super().__init__()
        self.how, self.at, self.rank = how, at, rank
        self.calls = 0

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        self.calls += 1
        if self.calls == self.at:
            if self.how == "stuck" and self.rank != RANK:
                threading.Event().wait()
            elif self.rank == RANK:
                self._break()
        return super().step(model, batch)

    def _break(self) -> None:
        if self.how == "kill once" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if self.how in ("kill", "kill once"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise RuntimeError("the disk of this rank fell out")


class BecomesNaN(Digits):
    """Its loss is NaN from the tenth batch on."""

    calls = 0

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        output = super().step(model, batch)
        self.calls += 1
        factor = float("nan") if self.calls > 10 else 1.0
        return StepOutput(output.loss * factor, output.weight, output.metrics)


class OneSample(Digits):
    """Less data than ranks."""

    def train_data(self) -> DataLoader[Any]:
        return DataLoader(Subset(super().train_data().dataset, range(1)), 4)


class CannotLoad(Digits):
    """Raises where the data is made, on one rank alone, while the others go on into collectives."""

    def train_data(self) -> DataLoader[Any]:
        if RANK == 1:
            raise FileNotFoundError("no such file: images.zip")
        return super().train_data()


class Steep(Digits):
    """A loss a hundred times as large."""

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        output = super().step(model, batch)
        return StepOutput(100 * output.loss, output.weight, output.metrics)
