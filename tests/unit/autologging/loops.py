"""Loops of other people's, as tests of autologging write them, and autologging put on and taken off around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.checkpoint.format.commit import Manifest, list_checkpoints
from harness.config.schema import CheckpointConfig, TrackingConfig
from tests.distributed.gathered import gather_state

State = dict[str, Tensor]
On = Callable[..., Patcher]


def switching(run_dir: Path, name: str) -> Iterator[On]:
    """Autologging without MLflow, a checkpoint each epoch; the earlier one is off then, as in a new process."""
    made: list[Patcher] = []

    def turn_on(
        run_name: str | None = name,
        resume: str = "auto",
        *,
        every_n_epochs: int = 1,
        reset_scheduler: bool = False,
        **checkpoint: Any,
    ) -> Patcher:
        for earlier in made:
            earlier.turn_off()
        AcceleratorState._reset_state(True)
        settings = AutologSettings(
            CheckpointConfig(every_n_epochs=every_n_epochs, when_busy="wait", **checkpoint),
            TrackingConfig(enabled=False, log_every_n_steps=None),
            run_name=run_name,
            run_dir=str(run_dir),
            resume_from=resume,
            reset_scheduler=reset_scheduler,
        )
        made.append(Patcher(settings))
        made[-1].turn_on()
        return made[-1]

    yield turn_on
    for switch in made:
        switch.turn_off()
    AcceleratorState._reset_state(True)


def checkpoints(directory: Path, run_name: str = "run") -> dict[str, Manifest]:
    return dict(list_checkpoints(directory / run_name / "checkpoints"))


def images(num: int = 40, *, shift: float = 0.0) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(num, 6, generator=generator) + shift, torch.arange(num) % 3)


class Loop:
    """What the loops below have in common: prepared objects, and the state at the end of each epoch's body."""

    def __init__(self, accelerator: Accelerator | None = None, *, workers: int = 0, batch_size: int = 8) -> None:
        self.accelerator = accelerator or Accelerator(cpu=True)
        set_seed(1)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        train = DataLoader(images(), batch_size=batch_size, shuffle=True, num_workers=workers)
        evaluation, other = DataLoader(images(12), batch_size=4), DataLoader(images(9, shift=1.0), batch_size=4)
        prepared = self.accelerator.prepare(model, optimizer, train, evaluation, other)
        self.model, self.optimizer, self.train, self.evaluation, self.other = prepared
        self.states: list[State] = []
        self.losses: list[float] = []

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        self.losses.append(loss.item())
        return loss

    def step(self, batch: Any) -> None:
        self.accelerator.backward(self.loss(batch))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self, loader: Any) -> float:
        self.model.eval()
        correct = total = 0
        for inputs, labels in loader:
            with torch.no_grad():
                predictions = self.model(inputs).argmax(-1)
            predictions, labels = self.accelerator.gather_for_metrics((predictions, labels))
            correct, total = correct + int((predictions == labels).sum()), total + len(labels)
        return correct / total

    def keep_state(self) -> None:
        gathered = gather_state(self.accelerator, self.model, self.optimizer)
        self.states.append({**gathered.model, **{f"optimizer.{k}": v.clone() for k, v in gathered.optimizer.items()}})

    def plain(self, num_epochs: int, stops: Callable[[int, int], None] = lambda epoch, batch: None) -> None:
        """Training, evaluation, a scheduler of the script's own: the loop of most examples."""
        for epoch in range(num_epochs):
            self.model.train()
            for number, batch in enumerate(self.train):
                self.step(batch)
                stops(epoch, number)
            self.accelerator.log({"accuracy": self.evaluate(self.evaluation)}, step=epoch)
            self.scheduler.step()
            self.keep_state()


def require_states(directory: Path, states: list[State], run_name: str = "run") -> None:
    """Each epoch's checkpoint is the state that the loop kept, to the last bit."""
    found = checkpoints(directory, run_name)
    assert list(found) == [f"epoch-{epoch + 1:04d}" for epoch in range(len(states))]
    for name, state in zip(found, states, strict=True):
        saved = load_file(directory / run_name / "checkpoints" / name / "model.safetensors")
        moments = load_file(directory / run_name / "checkpoints" / name / "optimizer.safetensors")
        saved |= {f"optimizer.{key}": value for key, value in moments.items()}
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in saved), name
