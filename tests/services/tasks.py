"""Tasks that wait at one step until the test releases them."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor, nn

from harness.config.task import StepOutput
from harness.tasks import Digits

_LIMIT_S = 60


class Waits(Digits):
    """At its `at`-th batch it makes the file ``arrived`` in `directory` and waits for the file ``go``."""

    def __init__(self, directory: str, at: int = 30) -> None:
        super().__init__()
        self.directory, self.at = Path(directory), at
        self.calls = 0

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        self.calls += 1
        if self.calls == self.at:
            (self.directory / "arrived").touch()
            deadline_s = time.monotonic() + _LIMIT_S
            while not (self.directory / "go").exists() and time.monotonic() < deadline_s:
                time.sleep(0.02)
        return super().step(model, batch)


class Sealed(Waits):
    """Knows secrets, as one that reads from a database does; `fails` after its wait with an error that names them."""

    def __init__(self, directory: str, uri: str, password: str, fails: bool = False) -> None:
        super().__init__(directory, at=120)
        self.uri, self.password, self.fails = uri, password, fails

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        output = super().step(model, batch)
        if self.fails and self.calls == self.at:
            raise ConnectionError(f"cannot connect to {self.uri} (password='{self.password}')")
        return output
