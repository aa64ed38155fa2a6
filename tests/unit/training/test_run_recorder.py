"""Data sets as inputs of a run: described by what passes by, and never read for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness import PeriodicLogger
from harness.autologging.patcher import Patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.tracking.journal.entries import read_entries

TRACKING = TrackingConfig(offline=True)


class Drawing(Dataset[Any]):
    """Keeps which samples were read, and draws each from a generator of its own."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.read: list[int] = []
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return self.scale * torch.rand(4, generator=self.generator)


def parts(data: Drawing) -> Any:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return accelerator, *accelerator.prepare(model, optimizer, DataLoader(data, 4, shuffle=True))


def step(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    accelerator.backward(model(batch).sum())
    batch.zero_()  # in place, as a script may
    optimizer.step()
    optimizer.zero_grad()


def plain(data: Drawing, directory: Path, num_epochs: int) -> None:
    accelerator, model, optimizer, loader = parts(data)
    for _ in range(num_epochs):
        for batch in loader:
            step(accelerator, model, optimizer, batch)


def own_loop(data: Drawing, directory: Path, num_epochs: int) -> None:
    accelerator, model, optimizer, loader = parts(data)
    with PeriodicLogger(accelerator, 1, run_name="run", run_dir=directory, tracking=TRACKING) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(num_epochs):
            for batch in logger.batches(loader):
                step(accelerator, model, optimizer, batch)


def autologged(data: Drawing, directory: Path, num_epochs: int) -> None:
    switch = Patcher(
        AutologSettings(CheckpointConfig(every_n_epochs=1), TRACKING, run_name="run", run_dir=str(directory))
    )
    switch.turn_on()
    try:
        plain(data, directory, num_epochs)
        switch.finish()
    finally:
        switch.turn_off()


Train = Callable[[Drawing, Path, int], None]
WAYS = [pytest.param(own_loop, id="own-loop"), pytest.param(autologged, id="autologged")]


@pytest.fixture(autouse=True)
def no_accelerator_is_left() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


def records(directory: Path) -> list[dict[str, Any]]:
    return [entry.body for entry in read_entries(directory / "run/outbox", kinds=("dataset",))]


@pytest.mark.parametrize("train", WAYS)
def test_data_set_is_read_as_without_us_when_it_is_described(train: Train, tmp_path: Path) -> None:
    expected, data = Drawing(), Drawing()
    plain(expected, tmp_path, 2)
    train(data, tmp_path, 2)
    assert data.read == expected.read
    assert torch.equal(data.generator.get_state(), expected.generator.get_state())
    (record,) = records(tmp_path)
    assert (record["name"], record["context"], record["profile"]) == ("Drawing", "train", '{"num_rows": 12}')


@pytest.mark.parametrize("train", WAYS)
def test_digest_stays_when_a_run_is_resumed(train: Train, tmp_path: Path) -> None:
    train(Drawing(), tmp_path, 1)
    train(Drawing(), tmp_path, 3)
    (record,) = records(tmp_path)
    train(Drawing(), tmp_path / "same", 1)
    train(Drawing(scale=2.0), tmp_path / "other", 1)
    assert records(tmp_path / "same") == [record]
    assert records(tmp_path / "other")[0]["digest"] != record["digest"]


def test_digest_is_added_when_a_data_set_with_one_of_its_own_changes(tmp_path: Path) -> None:
    for num_epochs, digest in ((1, "first"), (2, "first"), (3, "second")):
        data = Drawing()
        data.digest = digest  # type: ignore[attr-defined]
        own_loop(data, tmp_path, num_epochs)
    assert [record["digest"] for record in records(tmp_path)] == ["first", "second"]
