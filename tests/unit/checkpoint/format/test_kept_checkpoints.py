"""Checkpoints that earlier versions wrote, in `kept/<commit>`, by the runs below."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.checkpoint.format.commit import MANIFEST, VERSION, read_manifest
from harness.checkpoint.format.verify import require_whole, verify

KEPT = Path(__file__).parent / "kept"
ROOT = Path(__file__).resolve().parents[4]


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


def test_training_continues_when_the_first_version_2_wrote_it(accelerator: Accelerator, tmp_path: Path) -> None:
    checkpoint = KEPT / "a7746f9" / "epoch-0002"
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
    expected = load_file(KEPT / "a7746f9" / "after_four_epochs.safetensors")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_run_is_resumed_when_the_last_version_2_wrote_it(tmp_path: Path) -> None:
    """By ``harness train --config configs/digits.yaml --task.init_args.width 4 --checkpoint.every_n_epochs 2``."""
    kept = KEPT / "809e21d"
    checkpoint = kept / "epoch-0002"
    assert json.loads((checkpoint / MANIFEST).read_text())["version"] == 2
    require_whole(checkpoint)
    words = ["--task.init_args.width", "4", "--trainer.max_epochs", "4", "--checkpoint.every_n_epochs", "2"]
    words += ["--resume_from_checkpoint", str(checkpoint), "--run_dir", str(tmp_path), "--run_name", "it"]
    words += ["--tracking.enabled", "false", "--config", str(ROOT / "configs" / "digits.yaml")]
    subprocess.run([sys.executable, "-m", "launch.cli", "train", *words], check=True, timeout=120, cwd=ROOT)
    found = tmp_path / "it" / "checkpoints" / "epoch-0004"
    assert json.loads((found / MANIFEST).read_text())["version"] == VERSION
    assert (verify(found).problems, read_manifest(found).step) == ((), 2 * read_manifest(checkpoint).step)
    # The kept run's own epoch 4. Not to the bit, since processors differ.
    weights, expected = (load_file(path / "model.safetensors") for path in (found, kept / "epoch-0004"))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
