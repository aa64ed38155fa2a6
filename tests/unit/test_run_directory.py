from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from harness.config import CheckpointConfig, ClassSpec, EarlyStopping, RunConfig, TrackingConfig, TrainerConfig
from harness.errors import ConfigError, RunDirError
from harness.options import parse_run_config
from harness.run_directory import make_run_directory, write_config


def test_record_is_on_disk_when_the_directory_is_made(tmp_path: Path) -> None:
    name, path = make_run_directory(tmp_path / "deep" / "runs", "mine", None)
    record = json.loads((path / "run.json").read_text())
    assert (name, path) == ("mine", tmp_path / "deep" / "runs" / "mine")
    assert record["run_name"] == "mine"
    assert re.fullmatch(r"mine-[0-9a-f]{32}", record["run_key"])
    assert (path / "checkpoints").is_dir()
    assert not list(path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(
    ("stem", "begin"), [("digits", "digits-"), (None, "run-"), ("my team/vit 2", "my-team-vit-2-"), ("../..", "run-")]
)
def test_name_is_made_up_from_stem_and_time_when_none_is_given(tmp_path: Path, stem: str | None, begin: str) -> None:
    name, path = make_run_directory(tmp_path, None, stem)
    assert re.fullmatch(re.escape(begin) + r"\d{8}-\d{6}", name)
    assert path == tmp_path / name


def test_names_differ_when_made_up_in_the_same_second(tmp_path: Path) -> None:
    names = [make_run_directory(tmp_path, None, "x")[0] for _ in range(4)]
    assert len({*names}) == 4


def test_keys_differ_when_two_directories_have_the_same_name(tmp_path: Path) -> None:
    keys = set()
    for runs in ("a", "b"):
        _, path = make_run_directory(tmp_path / runs, "same", None)
        keys.add(json.loads((path / "run.json").read_text())["run_key"])
    assert len(keys) == 2


def test_error_names_the_directory_when_it_holds_a_run(tmp_path: Path) -> None:
    make_run_directory(tmp_path, "mine", None)
    before = (tmp_path / "mine" / "run.json").read_text()
    with pytest.raises(RunDirError, match=f"{tmp_path / 'mine'} holds a run already") as caught:
        make_run_directory(tmp_path, "mine", None)
    assert caught.value.exit_code == 2
    assert (tmp_path / "mine" / "run.json").read_text() == before


def test_error_has_the_remedy_when_the_path_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirError, match=r"run_dir: cannot write into .*file/mine: .*--run_dir"):
        make_run_directory(tmp_path / "file", "mine", None)


def test_error_is_told_when_the_name_would_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        make_run_directory(tmp_path, "../elsewhere", None)
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_when_a_save_was_cut_off_before(tmp_path: Path) -> None:
    torn = tmp_path / "mine" / "checkpoints" / ".tmp-epoch-0001"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    make_run_directory(tmp_path, "mine", None)
    assert not torn.exists()


def test_configuration_parses_to_the_same_when_written(tmp_path: Path) -> None:
    config = RunConfig(
        task=ClassSpec("harness.tasks.Digits", {"width": 4}),
        optimizer=ClassSpec("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}),
        scheduler=ClassSpec("torch.optim.lr_scheduler.StepLR", {"step_size": 3}),
        run_name="2024",
        trainer=TrainerConfig(max_steps=7, early_stopping=EarlyStopping("eval/loss", "min", 2)),
        checkpoint=CheckpointConfig(every_n_epochs=None, every_n_steps=3, max_shard_size="5GB"),
        tracking=TrackingConfig(tracking_uri="http://localhost:5000", tags={"team": "vision"}),
    )
    write_config(tmp_path, config)
    assert parse_run_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_password_is_left_out_when_the_configuration_is_written(tmp_path: Path) -> None:
    tracking = TrackingConfig(tracking_uri="postgresql://me:hunter2@host/db")
    write_config(tmp_path, RunConfig(ClassSpec("a.B"), tracking=tracking))
    text = (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert "postgresql://me:***@host/db" in text


def test_error_is_told_when_the_configuration_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"run_dir: cannot write .*config\.yaml"):
        write_config(tmp_path / "missing", RunConfig(ClassSpec("a.B")))
