"""SIGTERM within an evaluation of a script under `harness run`: it stops there, and goes on as if it had not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.format.commit import list_checkpoints
from harness.errors import EXIT_REQUEUE
from tests.launching import Done, harness, run

# Between a pass and the evaluation behind it the scheduler steps and random numbers are drawn.
SCRIPT = """
import os, sys, torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

stops, swaps = "stops" in sys.argv, "swaps" in sys.argv
set_seed(0)
accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), 0.05)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
loader = DataLoader(TensorDataset(torch.randn(32, 4)), 4, shuffle=True)
evaluation = DataLoader(TensorDataset(torch.randn(40, 4)), 4)
model, optimizer, scheduler, loader, evaluation = accelerator.prepare(model, optimizer, scheduler, loader, evaluation)
for epoch in range(3):
    model.train()
    for (inputs,) in loader:
        accelerator.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    scheduler.step()
    torch.rand(3)
    if swaps:
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    model.eval()
    with torch.no_grad():
        for number, (inputs,) in enumerate(evaluation):
            model(inputs)
            if stops and epoch == 1 and number == 2:
                os.kill(os.getpid(), 15)
            print("evaluated", epoch, number, flush=True)
    if swaps:
        for parameter in model.parameters():
            parameter.data.sub_(1.0)
"""


def trained(cwd: Path, *words: str, resume: str = "never") -> Done:
    cwd.mkdir(exist_ok=True)
    (cwd / "it.py").write_text(SCRIPT)
    options = ("--every_n_epochs", "null", "--run_name", "it", "--resume", resume)
    return run(harness("run", *options, "it.py", *words), cwd)


@pytest.mark.usefixtures("empty_database")
def test_script_stops_there_and_goes_on_exactly_when_it_is_told_to_within_an_evaluation(tmp_path: Path) -> None:
    assert trained(tmp_path / "whole").code == 0
    stopped = trained(tmp_path / "cut", "stops")
    assert stopped.code == EXIT_REQUEUE, stopped.output
    evaluated = [line for line in stopped.output.splitlines() if line.startswith("evaluated 1")]
    assert evaluated == ["evaluated 1 0", "evaluated 1 1", "evaluated 1 2"]
    assert "SIGTERM: stopped after step 16" in stopped.output
    resumed = trained(tmp_path / "cut", resume="auto")
    assert resumed.code == 0, resumed.output
    assert "evaluated 1 9" in resumed.output
    for part in ("model", "optimizer"):
        whole, cut = (load_file(last(tmp_path / name) / f"{part}.safetensors") for name in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[name], cut[name]) for name in whole), part


def last(cwd: Path) -> Path:
    checkpoints = cwd / "runs" / "it" / "checkpoints"
    (*_, (name, _)) = list_checkpoints(checkpoints)
    assert name == "epoch-0003"
    return checkpoints / name


@pytest.mark.usefixtures("empty_database")
def test_evaluation_goes_on_to_its_end_when_its_weights_are_others_than_the_trainings(tmp_path: Path) -> None:
    stopped = trained(tmp_path, "stops", "swaps")
    assert stopped.code == EXIT_REQUEUE, stopped.output
    assert "evaluated 1 9" in stopped.output
    assert "evaluated 2 0" not in stopped.output
