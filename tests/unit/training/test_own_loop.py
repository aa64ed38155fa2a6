"""Loops whose data are shorter than before where the run is resumed, or give nothing at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.errors import DataError


class Rows(IterableDataset[torch.Tensor]):
    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.ones(self.num_rows, 3))


class Crash(Exception):
    pass


def train(
    run_dir: Path,
    num_rows: int,
    *,
    is_stream: bool,
    limit: int | None = None,
    num_epochs: int = 3,
    crash_at: int | None = None,
) -> list[int]:
    """How many batches of two rows each epoch had."""
    AcceleratorState._reset_state(True)
    # accelerate's own dispatcher refuses a stream that is empty.
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=None if num_rows else False)
    )
    model = torch.nn.Linear(3, 1)
    data: Any = Rows(num_rows) if is_stream else torch.ones(num_rows, 3)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(data, batch_size=2)
    )
    counts: list[int] = []
    with PeriodicLogger(
        accelerator,
        1,
        run_name="run",
        run_dir=run_dir,
        checkpoint=CheckpointConfig(every_n_steps=1, when_busy="wait"),
        tracking=TrackingConfig(enabled=False),
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(num_epochs):
            counts.append(0)
            for batch in logger.batches(loader, limit):
                accelerator.backward(model(batch).mean())
                optimizer.step()
                counts[-1] += 1
                if logger.step == crash_at:
                    raise Crash
    return counts


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("num_rows", "limit", "whole"), [(4, None, 2), (6, None, 3), (12, 2, 2)])
def test_next_epochs_are_trained_when_the_data_end_before_the_position(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_stream: bool, num_rows: int, limit: int | None, whole: int
) -> None:
    with pytest.raises(Crash):
        train(tmp_path, 12, is_stream=is_stream, crash_at=4)
    capsys.readouterr()
    assert train(tmp_path, num_rows, is_stream=is_stream, limit=limit) == [0, whole, whole]
    assert "continues with the next epoch" in capsys.readouterr().err


def test_run_fails_when_only_an_epoch_is_left_that_gives_nothing(tmp_path: Path) -> None:
    with pytest.raises(Crash):
        train(tmp_path, 12, is_stream=False, num_epochs=1, crash_at=4)
    with pytest.raises(DataError, match="gave no batch"):
        train(tmp_path, 4, is_stream=False, num_epochs=1)


def test_run_fails_when_a_stream_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gave no batch"):
        train(tmp_path, 0, is_stream=True)
