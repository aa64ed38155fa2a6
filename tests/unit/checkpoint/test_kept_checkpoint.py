"""A checkpoint that an earlier version has written: `kept/<commit>`, made by that commit with the run below."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.verify import require_whole

KEPT = Path(__file__).parent / "kept"


def train(accelerator: Accelerator, run_dir: Path, checkpoint: Path, epochs: int) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    data = DataLoader(torch.linspace(0, 1, 48).reshape(12, 4), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data)
    with PeriodicLogger(
        accelerator,
        None,
        run_dir=run_dir,
        run_name="continued",
        checkpoint=CheckpointConfig(save_last=False),
        tracking=TrackingConfig(enabled=False),
        resume_from_checkpoint=str(checkpoint),
    ) as logger:
        logger.watch(model, optimizer, scheduler)
        for _ in logger.epochs(epochs):
            for batch in logger.batches(loader):
                accelerator.backward(model(batch).pow(2).mean())
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("commit", [path.name for path in sorted(KEPT.iterdir())])
def test_run_continues_from_a_checkpoint_of_an_earlier_version(
    accelerator: Accelerator, tmp_path: Path, commit: str
) -> None:
    checkpoint = KEPT / commit / "epoch-0002"
    require_whole(checkpoint)
    # Nothing is trained: the state is the file's.
    model, optimizer, scheduler = train(accelerator, tmp_path / "none", checkpoint, 2)
    weights = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    moments = load_file(checkpoint / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = optimizer.optimizer.state[parameter]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, value in state.items():
            assert value.dtype == moments[f"{kind}.{name}"].dtype
            assert torch.equal(value, moments[f"{kind}.{name}"])
    assert (scheduler.last_epoch, scheduler.get_last_lr()) == (2, [pytest.approx(0.01)])
    # The rest of the training: shuffled data and dropout continue. Not to the bit, since processors differ.
    model, _, _ = train(accelerator, tmp_path / "rest", checkpoint, 4)
    expected = load_file(KEPT / commit / "after_four_epochs.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
