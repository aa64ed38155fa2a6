from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import torch

from harness.checkpoint.format.verify import verify
from harness.checkpoint.restore.locate import (
    _DOWNLOAD_TIMEOUT_S,
    find_checkpoints,
    is_in_mlflow,
    locate,
    locate_weights,
    longest_wait_s,
    remove_downloads,
)
from harness.errors import CheckpointError, ConfigError
from tests.services.mlflow_server import make_database

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


def test_others_wait_longer_than_a_download_may_take_when_one_is_asked_for() -> None:
    assert longest_wait_s("auto", None) == longest_wait_s("runs/it", "somewhere") == 0
    # What is downloaded is read again, too.
    assert longest_wait_s("runs:/0123/it", None) == longest_wait_s("auto", "models:/m-1") > 1.5 * _DOWNLOAD_TIMEOUT_S


@pytest.fixture
def logged(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> tuple[str, str]:
    """The address of a checkpoint in a real MLflow store, and the store's."""
    path = make_checkpoint(MODEL, OPTIMIZER)
    uri = make_database(tmp_path / "mlflow.db")
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("it", artifact_location=str(tmp_path / "artifacts"))
    run_id = client.create_run(experiment).info.run_id
    client.log_artifacts(run_id, str(path), "saved")
    return f"runs:/{run_id}/saved", uri


NOWHERE = "http://127.0.0.1:9"


def test_nothing_is_downloaded_again_when_all_of_it_is_there(logged: tuple[str, str], tmp_path: Path) -> None:
    where, uri = logged
    downloads = tmp_path / "downloads"
    (path,) = locate(KEY, where, downloads, uri)
    assert verify(path).problems == ()
    # There is no server: it would be an error to ask for it.
    assert locate(KEY, where, downloads, NOWHERE) == [path]
    assert locate_weights("initial_weights", where, downloads, NOWHERE) == path
    assert len(list(downloads.iterdir())) == 1
    remove_downloads(downloads)
    remove_downloads(downloads)
    assert not downloads.exists()
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        locate(KEY, where, downloads, NOWHERE)


def test_it_is_downloaded_again_when_what_is_there_is_not_whole(logged: tuple[str, str], tmp_path: Path) -> None:
    where, uri = logged
    downloads = tmp_path / "downloads"
    (path,) = locate(KEY, where, downloads, uri)
    for name, num_cut in (("model.safetensors", 1), ("model.safetensors", None), ("manifest.json", None)):
        file = path / name
        content = file.read_bytes()
        file.unlink()
        if num_cut is not None:
            file.write_bytes(content[:-num_cut])
        assert locate(KEY, where, downloads, uri) == [path]
        assert file.read_bytes() == content
        assert len(list(downloads.iterdir())) == 1
