"""A script that ends with `torch.distributed.destroy_process_group()`, as torch asks: the run ends well behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.commit import list_checkpoints
from tests.distributed.own_loops import BATCH_SIZE, Numbered
from tests.distributed.saving_ranks import become_rank
from tests.distributed.test_saver import ranks
from tests.launching import harness, run
from tests.mlflow_reader import client, history, only_run

pytestmark = pytest.mark.usefixtures("empty_database")

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
model = torch.nn.Linear(4, 1)
loader = DataLoader(TensorDataset(torch.ones(16, 4)), 4)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
try:
    for epoch in range(2):
        for (inputs,) in loader:
            if sys.argv[1:] == ["fails"] and epoch:
                raise KeyError("mine")
            accelerator.backward(model(inputs).mean())
            optimizer.step()
            optimizer.zero_grad()
finally:
    dist.destroy_process_group()
"""


def destroy_before_the_end(rank: int, world_size: int, port: int, directory: Path) -> None:
    """An own loop that is left, and closed, behind the group's end."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    model: Any = nn.Linear(3, 1)
    loader: Any = torch.utils.data.DataLoader(Numbered(), BATCH_SIZE)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
    with PeriodicLogger(
        accelerator,
        None,
        run_name="run",
        run_dir=directory,
        checkpoint=CheckpointConfig(every_n_epochs=1),
        tracking=TrackingConfig(enabled=False),
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(1):
            for _, inputs in logger.batches(loader):
                accelerator.backward(model(inputs).mean())
                optimizer.step()
                optimizer.zero_grad()
        # A name that no window had before: its exchange is collective, and comes with the end.
        logger.log({"late": float(rank)})
        dist.destroy_process_group()
    (directory / f"done-{rank}.json").write_text(json.dumps(dict(logger.latest)))


def test_run_ends_well_when_an_own_loop_is_closed_behind_the_groups_end(tmp_path: Path) -> None:
    with ranks(2, destroy_before_the_end, tmp_path) as processes:
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0]
    assert [name for name, _ in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["epoch-0001"]
    assert [json.loads((tmp_path / f"done-{rank}.json").read_text())["late"] for rank in range(2)] == [0.5, 0.5]


@pytest.mark.parametrize(("words", "code", "status"), [((), 0, "FINISHED"), (("fails",), 1, "FAILED")])
def test_run_ends_as_the_script_does_when_it_destroys_the_group(
    tmp_path: Path, words: tuple[str, ...], code: int, status: str
) -> None:
    (tmp_path / "it.py").write_text(SCRIPT)
    done = run(
        harness("run", "--num_processes", "2", "--every_n_epochs", "2", "--run_name", "it", "it.py", *words), tmp_path
    )
    assert done.code == code, done.output
    mlflow_run = only_run(tmp_path, wait_for_end_s=20)
    assert mlflow_run.info.status == status, done.output
    checkpoints = [name for name, _ in list_checkpoints(tmp_path / "runs" / "it" / "checkpoints")]
    # The last checkpoint, and the last epoch's metrics, come with the end; none of it where the script has failed.
    assert checkpoints == ([] if words else ["epoch-0002"])
    if not words:
        assert len(history(client(tmp_path), mlflow_run, "train/loss")) == 2
