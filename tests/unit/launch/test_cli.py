from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from harness import __version__
from harness.checkpoint.commit import FileRecord, Manifest, begin, commit
from launch.cli import main

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "configs" / "digits.yaml")


def harness(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "launch.cli", *words],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    final = tmp_path / "runs" / "mine" / "checkpoints" / "epoch-0001"
    files = (FileRecord("model.safetensors", 5, ((0, 5, "ab"),)),)
    commit(begin(final), final, Manifest("key", 1, 10, 1, {"eval/loss": 0.5}, files, {}, {}))
    path = tmp_path / "runs" / "mine"
    (path / "run.json").write_text(json.dumps({"run_name": "mine"}))
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--config", "missing.yaml"], "--config: there is no file missing.yaml"),
        (["train", "--config"], "--config: needs a YAML file"),
        (["train", "--config", DIGITS, "--trainer.max_epoch", "3"], "trainer.max_epoch"),
        (["train", "--config", DIGITS, "--checkpoint.every_n_epochs", "0"], "checkpoint.every_n_epochs: must be"),
        (["train"], "task.class_path: is missing"),
        (["launch", "--config", "missing.yaml"], "--config: there is no file missing.yaml"),
        (["launch", "--config", DIGITS, "--strategy", "hsdp", "--num_processes", "3"], "--num_processes: hsdp needs"),
        (["debug", "--config", DIGITS, "--trainr.max_epochs", "3"], "trainr.max_epochs"),
        (["checkpoints", "."], "is not the directory of a run"),
        (["sync", "nowhere"], "nowhere: is not the directory of a run"),
    ],
)
def test_error_is_one_line_and_exit_code_2_when_usage_is_wrong(tmp_path: Path, words: list[str], expected: str) -> None:
    done = harness(tmp_path, *words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.startswith("harness: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # a wrong command leaves nothing


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND"),
        (["fly"], "'fly'"),
        (["checkpoints"], "RUN_DIR"),
        (["launch", "--num_processes", "many"], "--num_processes"),
        (["launch", "--strategy", "fsdp1"], "'fsdp1'"),
    ],
)
def test_error_names_the_word_when_the_command_line_is_wrong(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: error: ")
    assert expected in line


def test_version_is_printed_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"harness {__version__}\n"


@pytest.mark.parametrize("command", ["train", "debug"])
def test_options_of_the_configuration_are_listed_when_help_is_asked(tmp_path: Path, command: str) -> None:
    done = harness(tmp_path, command, "--help")
    assert done.returncode == 0
    assert f"harness {command}" in done.stdout
    assert "--trainer.max_epochs" in done.stdout


def test_table_is_printed_when_there_are_checkpoints(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert "eval/loss" in header
    assert row.split() == ["1", "10", "5", "0.5000", "epoch-0001", "not", "yet"]


def test_json_is_printed_when_asked(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", str(run_dir), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert (record["name"], record["step"], record["metrics"]) == ("epoch-0001", 10, {"eval/loss": 0.5})


def test_exit_code_is_1_when_a_checkpoint_is_damaged(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run_dir / "checkpoints" / "epoch-0001" / "manifest.json"
    manifest.write_text("{")
    assert main(["checkpoints", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"harness: error: {manifest}: cannot be read")


def test_error_is_told_when_a_run_without_tracking_is_synced(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "outbox").mkdir()
    assert main(["sync", str(run_dir)]) == 1
    assert "was run without tracking" in capsys.readouterr().err
