from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.checkpoint.locate import find_checkpoints, is_in_mlflow, locate
from harness.errors import CheckpointError, ConfigError

KEY = "resume_from_checkpoint"
MODEL = {"weight": torch.ones(3)}
OPTIMIZER = {"exp_avg.weight": torch.ones(3)}


@pytest.fixture
def run_dir(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> Path:
    made = make_checkpoint(MODEL, OPTIMIZER)
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    made.rename(checkpoints / "epoch-0001")
    return tmp_path / "run"


def test_directory_is_found_when_a_checkpoint_is_given(run_dir: Path, tmp_path: Path) -> None:
    path = run_dir / "checkpoints" / "epoch-0001"
    assert locate(KEY, str(path), tmp_path / "d", None) == [path]


def test_weights_alone_are_not_gone_on_from_when_a_run_is_given(run_dir: Path, tmp_path: Path) -> None:
    # This one has no trainer's state.
    assert find_checkpoints(run_dir / "checkpoints").usable == []
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        locate(KEY, str(run_dir), tmp_path / "d", None)


def test_error_has_the_reason_when_all_are_damaged(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "checkpoints" / "epoch-0001" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        locate(KEY, str(run_dir), tmp_path / "d", None)


@pytest.mark.parametrize("where", ["runs/one", "/models/x", "models", "./runs:/x"])
def test_path_is_no_address_in_mlflow_when_it_looks_like_one(where: str) -> None:
    assert not is_in_mlflow(where)


@pytest.mark.parametrize("where", ["runs:/0123/checkpoint", "models:/m-1", "models:/digits/3"])
def test_address_is_told_from_a_path_when_it_has_a_scheme(where: str) -> None:
    assert is_in_mlflow(where)
