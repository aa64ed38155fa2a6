from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.config.parsing import parse_run_config
from harness.config.schema import CheckpointConfig, ClassSpec, EarlyStopping, RunConfig, TrackingConfig, TrainerConfig
from harness.errors import ConfigError, RunDirError
from harness.run.directory import RunDirectory, make_run_directory, note_stop, read_run_record, write_config


def make(runs_dir: Path, run_name: str | None, stem: str | None = None, resume: str = "auto") -> RunDirectory:
    """Made or found, as by a job that has ended since."""
    directory, lock = make_run_directory(runs_dir, run_name, stem, resume, lock_timeout_s=0)
    lock.release()
    return directory


def test_record_is_on_disk_when_the_directory_is_made(tmp_path: Path) -> None:
    made = make(tmp_path / "deep" / "runs", "mine")
    path = made.path
    record = json.loads((path / "run.json").read_text())
    assert made == RunDirectory("mine", tmp_path / "deep" / "runs" / "mine", 1)
    assert not made.continues
    assert record["run_name"] == "mine"
    assert re.fullmatch(r"mine-[0-9a-f]{32}", record["run_key"])
    assert (path / "checkpoints").is_dir()
    assert not list(path.glob(".*"))  # no temporary file is left


@pytest.mark.parametrize(
    ("stem", "begin"), [("digits", "digits-"), (None, "run-"), ("my team/vit 2", "my-team-vit-2-"), ("../..", "run-")]
)
def test_name_is_made_up_from_stem_and_time_when_none_is_given(tmp_path: Path, stem: str | None, begin: str) -> None:
    made = make(tmp_path, None, stem)
    assert re.fullmatch(re.escape(begin) + r"\d{8}-\d{6}", made.name)
    assert made.path == tmp_path / made.name


def test_names_differ_when_made_up_in_the_same_second(tmp_path: Path) -> None:
    names = [make(tmp_path, None, "x").name for _ in range(4)]
    assert len({*names}) == 4


def test_keys_differ_when_two_directories_have_the_same_name(tmp_path: Path) -> None:
    keys = set()
    for runs in ("a", "b"):
        path = make(tmp_path / runs, "same").path
        keys.add(json.loads((path / "run.json").read_text())["run_key"])
    assert len(keys) == 2


def test_error_names_the_directory_when_it_holds_a_run_and_never_is_said(tmp_path: Path) -> None:
    make(tmp_path, "mine", resume="never")
    before = (tmp_path / "mine" / "run.json").read_text()
    with pytest.raises(RunDirError, match=f"{tmp_path / 'mine'} holds a run already, .*; use auto") as caught:
        make(tmp_path, "mine", resume="never")
    assert caught.value.exit_code == 2
    assert (tmp_path / "mine" / "run.json").read_text() == before


def test_run_is_the_same_when_it_goes_on(tmp_path: Path) -> None:
    first = make(tmp_path, "mine")
    key = read_run_record(first.path)["run_key"]
    again = [make(tmp_path, "mine", resume=resume) for resume in ("auto", "some/checkpoint")]
    assert again == [RunDirectory("mine", first.path, 2), RunDirectory("mine", first.path, 3)]
    assert all(directory.continues for directory in again)
    assert read_run_record(first.path)["run_key"] == key


def test_attempt_is_the_second_when_an_earlier_version_made_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text('{"run_name": "mine", "run_key": "k", "created_ms": 1}')
    assert make(tmp_path, "mine").attempt == 2


@pytest.mark.parametrize("content", ["", "[]", '{"run_name": "mine"}'])
def test_error_is_told_when_the_record_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.json").write_text(content)
    with pytest.raises(RunDirError, match=r"run\.json: "):
        make(tmp_path, "mine")


def test_second_job_is_refused_and_changes_nothing_when_the_first_still_runs(tmp_path: Path) -> None:
    _, lock = make_run_directory(tmp_path, "mine", None, "auto")
    unfinished = tmp_path / "mine" / "checkpoints" / ".tmp-epoch-0001-a"
    unfinished.mkdir()
    before = (tmp_path / "mine" / "run.json").read_text()
    with pytest.raises(RunDirError, match="is in use by"):
        make(tmp_path, "mine")
    assert unfinished.exists()
    assert (tmp_path / "mine" / "run.json").read_text() == before
    lock.release()


ELASTIC = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("first", "other", "again"),
    [
        (
            {**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "0"},
            {**ELASTIC, "MASTER_PORT": "29501", "TORCHELASTIC_RESTART_COUNT": "0"},
            {**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "1"},
        ),
        ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}),
        (
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"},
            {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"},
            {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1", "SLURM_RESTART_COUNT": "2"},
        ),
    ],
    ids=["torchelastic", "slurm", "slurm-array"],
)
def test_launchs_own_run_goes_on_when_it_was_started_again_without_a_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    first: dict[str, str],
    other: dict[str, str],
    again: dict[str, str],
) -> None:
    def made_in(environment: dict[str, str], resume: str = "auto") -> RunDirectory:
        with launched_with(environment, monkeypatch):
            return make(tmp_path, None, resume=resume)

    mine = made_in(first)
    theirs = made_in(other)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    assert made_in(again) == RunDirectory(mine.name, mine.path, 2)
    assert made_in(again, "never").name not in (mine.name, theirs.name)
    # The same launch without a restart, as a second training in one job: a run of its own.
    assert made_in(first).attempt == 1


@contextmanager
def launched_with(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name in [key for key in os.environ if key.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_"))]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


@pytest.mark.parametrize("run_name", [None, "mine"])
def test_stop_is_told_when_the_launcher_starts_again_what_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_name: str | None
) -> None:
    with launched_with({**ELASTIC, "TORCHELASTIC_RESTART_COUNT": "0"}, monkeypatch):
        first = make(tmp_path, run_name)
        assert first.stopped_by is None
        note_stop(first.path, "SIGUSR1")
    for count in ("1", "2"):
        with launched_with({**ELASTIC, "TORCHELASTIC_RESTART_COUNT": count}, monkeypatch):
            assert make(tmp_path, run_name).stopped_by == "SIGUSR1"
    # Somebody starts it anew, and then a rank dies.
    for count in ("0", "1"):
        with launched_with({**ELASTIC, "TORCHELASTIC_RESTART_COUNT": count}, monkeypatch):
            assert make(tmp_path, first.name).stopped_by is None


def test_queued_job_goes_on_when_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched_with({"SLURM_JOB_ID": "7"}, monkeypatch):
        first = make(tmp_path, "mine")
        note_stop(first.path, "SIGUSR1")
    with launched_with({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, monkeypatch):
        assert make(tmp_path, "mine") == RunDirectory("mine", first.path, 2)


def test_error_has_the_remedy_when_the_path_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirError, match=r"run_dir: cannot write into .*file/mine: .*--run_dir"):
        make(tmp_path / "file", "mine")


def test_error_is_told_when_the_name_would_leave_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_name"):
        make(tmp_path, "../elsewhere")
    assert not list(tmp_path.iterdir())


def test_leftovers_are_removed_when_a_save_was_cut_off_before(tmp_path: Path) -> None:
    torn = tmp_path / "mine" / "checkpoints" / ".tmp-epoch-0001"
    torn.mkdir(parents=True)
    (torn / "model.safetensors").write_bytes(b"half")
    make(tmp_path, "mine")
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
    task = ClassSpec("a.B", {"db": {"password": "hunter2", "table": "t"}, "uri": "postgresql://me:hunter2@host/db"})
    write_config(tmp_path, RunConfig(task, tracking=tracking))
    text = (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert "postgresql://me:***@host/db" in text


def test_error_is_told_when_the_configuration_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"run_dir: cannot write .*config\.yaml"):
        write_config(tmp_path / "missing", RunConfig(ClassSpec("a.B")))
