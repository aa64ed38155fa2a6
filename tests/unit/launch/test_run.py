"""`harness run`: its options, the script's arguments, and how the script ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.autologging import api, patcher
from harness.autologging.settings import AutologSettings
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.errors import HarnessError
from launch.run import run

SCRIPT = """
import json, sys
with open("found.json", "w") as file:
    json.dump([sys.argv, __name__, __file__, __package__, sys.path[0]], file)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Writes a script into the directory that is worked in; restores what running it changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(api, "_settings", AutologSettings())

    def write(text: str) -> Path:
        path = tmp_path / "train.py"
        path.write_text(text)
        return path

    yield write
    patcher.turn_off()


OPTIONS = {
    "--every_n_epochs": "null",
    "--log_models": "false",
    "--log_datasets": "False",
    "--log_every_n_steps": "7",
    "--monitor": "eval/accuracy",
    "--mode": "max",
    "--save_top_k": "3",
    "--registered_model_name": "digits",
    "--extra_tags": "team=a=b",
    "--silent": "true",
    "--exclusive": "true",
    "--when_busy": "skip",
    "--resume": "models:/m-0123",
    "--run_name": "mine",
    "--run_dir": "elsewhere",
    "--experiment_name": "exp",
}


def test_settings_are_those_of_the_options_when_all_are_given(script: Callable[[str], Path]) -> None:
    script(SCRIPT)
    words = [word for option in OPTIONS.items() for word in option]
    assert run([*words, "--reset_scheduler", "--extra_tags", "more=", "train.py"]) == 0
    assert patcher._on is not None
    assert patcher._on.settings == AutologSettings(
        CheckpointConfig(every_n_epochs=None, monitor="eval/accuracy", mode="max", save_top_k=3, when_busy="skip"),
        TrackingConfig(
            experiment_name="exp",
            log_every_n_steps=7,
            log_models=False,
            log_datasets=False,
            registered_model_name="digits",
            tags={"team": "a=b", "more": ""},
            silent=True,
        ),
        exclusive=True,
        run_name="mine",
        run_dir="elsewhere",
        resume_from="models:/m-0123",
        reset_scheduler=True,
    )


def test_settings_are_autologs_defaults_when_none_is_given(script: Callable[[str], Path]) -> None:
    script(SCRIPT)
    assert run(["train.py"]) == 0
    assert patcher._on is not None
    by_command = patcher._on.settings
    patcher.turn_off()
    api.autolog()
    assert patcher._on.settings == by_command
    assert by_command.checkpoint == CheckpointConfig(every_n_epochs=5, when_busy="wait")


def test_arguments_stay_the_scripts_when_named_like_ours(script: Callable[[str], Path]) -> None:
    path = script(SCRIPT)
    assert (
        run(["--every_n_epochs", "2", "--silent=true", "train.py", "--every_n_epochs", "7", "-m", "x", "--help"]) == 0
    )
    argv, name, file, package, first = json.loads(Path("found.json").read_text())
    assert argv == ["train.py", "--every_n_epochs", "7", "-m", "x", "--help"]
    assert (name, file, package, first) == ("__main__", str(path), None, str(path.parent))
    assert patcher._on is not None
    assert patcher._on.settings.checkpoint.every_n_epochs == 2


def test_module_runs_as_under_python_m_when_given(script: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "their_package").mkdir()
    module = script(SCRIPT).rename(tmp_path / "their_package" / "train.py")
    assert run(["--every_n_epochs", "2", "-m", "their_package.train", "--lr", "1"]) == 0
    argv, name, file, package, first = json.loads(Path("found.json").read_text())
    assert argv == [str(module), "--lr", "1"]
    assert (name, file, package, first) == ("__main__", str(module), "their_package", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a script"),
        (["--every_n_epochs", "2"], "give a script"),
        (["missing.py"], "there is no script missing.py"),
        (["-m"], "-m: needs the name of a module"),
        (["-m", "no_such_module"], "-m: there is no executable module no_such_module"),
        (
            ["--every_n_epoch", "2", "train.py"],
            "--every_n_epoch: is not an option of harness run (--help, --every_n_epochs,",
        ),
        (["--every_n_epochs", "two", "train.py"], "--every_n_epochs: must be a whole number or null, got 'two'"),
        (["--every_n_epochs", "0", "train.py"], "every_n_epochs: must be at least 1, got 0"),
        (["--save_top_k", "-2", "train.py"], "save_top_k: must be at least -1, got -2"),
        (["--log_models", "maybe", "train.py"], "--log_models: must be true or false, got 'maybe'"),
        (["--mode", "big", "train.py"], "--mode: invalid choice: 'big' (choose from 'min', 'max')"),
        (["--when_busy", "stop", "train.py"], "--when_busy: invalid choice: 'stop' (choose from 'wait', 'skip')"),
        (["--extra_tags", "a", "train.py"], "--extra_tags: must be NAME=TEXT, got 'a'"),
        (["--run_name", "a/b", "train.py"], "run_name: must be letters"),
        (["--num_processes", "0", "train.py"], "--num_processes: must be at least 1, got 0"),
        (["--strategy", "fsdp", "train.py"], "--strategy: invalid choice: 'fsdp'"),
        (["--strategy", "single", "--num_processes", "2", "train.py"], "--strategy single is one process"),
        (["--dry_run", "train.py"], "--dry_run: prints the launcher's command"),
        (["--resume", "runs/nosuch", "train.py"], "--resume: there is no runs/nosuch; give auto, never,"),
    ],
)
def test_error_names_the_word_when_it_is_invalid(script: Callable[[str], Path], words: list[str], message: str) -> None:
    script("raise AssertionError('the script has run')")
    with pytest.raises(HarnessError) as refused:
        run(words)
    assert message in str(refused.value)


def test_options_reach_the_ranks_when_several_are_started(
    script: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    script(SCRIPT)
    ours = ["--every_n_epochs", "2", "--strategy=zero2", "--num_processes", "3", "--dry_run", "--run_name", "x"]
    assert run([*ours, "train.py", "--num_processes", "9"]) == 0
    assert (
        capsys.readouterr()
        .out.strip()
        .endswith(
            "child_process.py launch.cli run --every_n_epochs 2 --dry_run --run_name x train.py --num_processes 9"
        )
    )


def test_help_names_each_option_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in OPTIONS)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("def f(:", '/train.py", line 1'),
        ("def f():\n    raise KeyError('mine')\nf()", '/train.py", line 3'),
    ],
)
def test_traceback_is_the_scripts_when_it_fails(
    script: Callable[[str], Path], capfd: pytest.CaptureFixture[str], text: str, place: str
) -> None:
    script(text)
    assert run(["train.py"]) == 1
    # The first frame is the script's.
    assert place in next(line for line in capfd.readouterr().err.splitlines() if "File" in line)


@pytest.mark.parametrize("code", [3, 0, None, "a reason"])
def test_exit_code_is_the_scripts_when_it_exits(script: Callable[[str], Path], code: object) -> None:
    script(f"import sys\nsys.exit({code!r})")
    with pytest.raises(SystemExit) as exit:
        run(["train.py"])
    assert exit.value.code == code


def test_error_is_raised_unchanged_when_it_is_a_harness_error(script: Callable[[str], Path]) -> None:
    script("from harness.errors import RunDirError\nraise RunDirError('runs/x: holds a run already')")
    with pytest.raises(HarnessError, match="runs/x: holds a run already"):
        run(["train.py"])


def test_latest_run_is_named_when_auto_starts_a_new_one(
    script: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script("")
    for name in ("train-1", "train-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    os.utime(tmp_path / "runs" / "train-2" / "run.json", (1, 1))
    assert run(["--resume", "auto", "train.py"]) == 0
    assert "starting run train; to resume the latest one, give --resume runs/train-1" in capsys.readouterr().err
    assert run(["--resume", "auto", "--run_name", "other", "train.py"]) == 0
    assert "to resume" not in capsys.readouterr().err
