"""What a script gives to `accelerator.register_for_checkpointing` is saved, and is as it was at a resume."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.verify import verify
from tests.unit.autologging.loops import Loop, On


class Crash(Exception):
    pass


class Average:
    """A moving average that replaces its tensors at a load, as scripts have it, and counts."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shadow = {name: value.clone().float() for name, value in model.state_dict().items()}
        self.num_updates, self.num_epochs = 0, 0

    def update(self, model: torch.nn.Module) -> None:
        self.num_updates += 1
        for name, value in model.state_dict().items():
            self.shadow[name].mul_(0.9).add_(value, alpha=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "counts": (self.num_updates, self.num_epochs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, (self.num_updates, self.num_epochs) = state["shadow"], state["counts"]


class Unsavable:
    def state_dict(self) -> dict[str, Any]:
        return {"itself": self}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved of it")


class EarlyStopping:
    """Its state can be saved until it has found something, as `best=None` at first."""

    def __init__(self, *, raises: bool) -> None:
        self.best: Any = None
        self._raises = raises

    def state_dict(self) -> dict[str, Any]:
        if self._raises and self.best is not None:
            raise RuntimeError("no state now")
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


class Averaging(Loop):
    """The loop of most examples, with an average and torch's own, and values of the average behind each epoch."""

    def __init__(self, *, registers_late: bool = False) -> None:
        super().__init__()
        self.average, self.averaged = Average(self.model), AveragedModel(self.model)
        if not registers_late:
            self.register()
        self.values: list[Tensor] = []

    def register(self) -> None:
        # accelerate's own examples register the scheduler, too.
        self.accelerator.register_for_checkpointing(self.average, self.averaged, self.scheduler)

    def run(
        self,
        stop_at: tuple[int, int] | None = None,
        *,
        crash_at: tuple[int, int] | None = None,
        registers_late: bool = False,
    ) -> Averaging:
        for epoch in range(4):
            if registers_late and epoch == 1:
                self.register()
            self.model.train()
            for number, batch in enumerate(self.train):
                self.step(batch)
                self.average.update(self.model)
                self.averaged.update_parameters(self.model)
                if (epoch, number) == stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                if (epoch, number) == crash_at:
                    raise Crash
            self.values.append(self.average.shadow["0.weight"].sum())
            self.average.num_epochs += 1
            self.scheduler.step()
        return self


@pytest.mark.parametrize("registers_late", [False, True])
@pytest.mark.parametrize("stop_at", [(1, 2), (1, 4), (2, 0)])
def test_registered_objects_end_as_if_never_stopped_when_resumed(
    on: On, tmp_path: Path, stop_at: tuple[int, int], registers_late: bool
) -> None:
    switch = on("whole")
    whole = Averaging(registers_late=registers_late).run(registers_late=registers_late)
    switch.finish()
    switch = on("cut")
    with pytest.raises(SystemExit):
        Averaging(registers_late=registers_late).run(stop_at, registers_late=registers_late)
    switch.turn_off()
    for name, _ in list_checkpoints(tmp_path / "cut" / "checkpoints"):
        verify(tmp_path / "cut" / "checkpoints" / name)

    switch = on("cut")
    resumed = Averaging(registers_late=registers_late).run(registers_late=registers_late)
    switch.finish()
    assert resumed.average.state_dict()["counts"] == whole.average.state_dict()["counts"] == (20, 4)
    assert all(torch.equal(value, whole.average.shadow[name]) for name, value in resumed.average.shadow.items())
    averages = resumed.averaged.state_dict(), whole.averaged.state_dict()
    assert all(torch.equal(averages[0][name], value) for name, value in averages[1].items())


def test_average_is_restored_when_the_last_epoch_is_replayed(on: On) -> None:
    switch = on("whole")
    whole = Averaging().run()
    switch.finish()
    switch = on("cut")
    with pytest.raises(Crash) as crash:
        Averaging().run(crash_at=(2, 0))
    switch.fail(crash.value)
    switch = on("cut")
    resumed = Averaging().run()
    switch.finish()
    assert resumed.values[1:] == whole.values[1:]


def test_line_is_said_when_a_registered_object_cannot_be_saved(on: On, capsys: pytest.CaptureFixture[str]) -> None:
    switch = on()
    loop = Loop()
    loop.accelerator.register_for_checkpointing(Unsavable())
    loop.plain(1)
    switch.finish()
    assert "Unsavable, given to register_for_checkpointing, is left out" in capsys.readouterr().err


@pytest.mark.parametrize("raises", [False, True])
def test_checkpoints_lack_an_object_when_it_becomes_unsavable(
    on: On, tmp_path: Path, capsys: pytest.CaptureFixture[str], raises: bool
) -> None:
    switch = on(when_failed="stop")
    loop = Averaging()
    stopping = EarlyStopping(raises=raises)
    loop.accelerator.register_for_checkpointing(stopping)

    def stops(epoch: int, number: int) -> None:
        if epoch >= 1:
            stopping.best = np.zeros(2)

    loop.plain(4, stops)
    switch.finish()
    directory = tmp_path / "run" / "checkpoints"
    names = [name for name, _ in list_checkpoints(directory)]
    assert names == [f"epoch-000{epoch}" for epoch in range(1, 5)]
    states = [set(json.loads((directory / name / "trainer_state.json").read_text())["states"]) for name in names]
    # The third object of the script's is its scheduler, which is saved as such.
    others = {"autolog", "custom_checkpoint_0", "custom_checkpoint_1"}
    assert states == [{*others, "custom_checkpoint_3"}] + [others] * 3
    errors = capsys.readouterr().err
    assert errors.count("EarlyStopping is left out of checkpoints while its state cannot be saved") == 1
    assert ("no state now" if raises else "numpy.ndarray") in errors
