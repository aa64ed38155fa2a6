"""Each command of the pages is valid: those on `runs/first` are run in turn, of others the options are checked."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from harness.config.parsing import parse_run_config
from launch.cli import main
from tests.docs.pages import PAGES, blocks
from tests.launching import ROOT, harness, run

LINES = sorted({line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines() if line})
# They need a run, and are run on one: in this order.
ON_A_RUN = [line for line in LINES if "runs/first" in line and not line.startswith("harness train")]
OTHERS = {"mlflow", "curl", "salloc"}


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_first_run_of_the_pages_is_trained_inspected_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    extra = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}
    trainings = sorted(line for line in LINES if line.endswith("--run_name first"))
    assert len(trainings) == 2 and len(ON_A_RUN) >= 5
    for line in [trainings[0], *ON_A_RUN, trainings[1]]:
        done = run(harness(*words_of(line)[1:]), tmp_path, extra=extra)
        assert done.code == 0, f"{line}\n{done.output[-3000:]}"
    assert (tmp_path / "runs/first/checkpoints/epoch-0004/manifest.json").exists()


def harness_words(line: str) -> list[str] | None:
    """The `harness` command in a line, which another program may start."""
    words = words_of(line)
    if "harness" not in words:
        return None
    words = words[words.index("harness") + 1 :]
    return ["train", *words] if "-m harness" in line else words


@pytest.mark.parametrize("line", [line for line in LINES if harness_words(line) and line not in ON_A_RUN])
def test_options_of_a_command_are_valid(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = harness_words(line)
    assert words is not None
    command, options = words[0], words[1:]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "own_task.yaml").symlink_to(ROOT / "examples" / "own_task.yaml")
    (tmp_path / "sweep.txt").write_text("--optimizer.init_args.lr 0.01\n")
    (tmp_path / "runs" / "train").mkdir(parents=True)
    if "--config_file" in line:
        assert Path(words_of(line)[words_of(line).index("--config_file") + 1]).exists()
    if "--help" in options or "--print_config" in options:
        with pytest.raises(SystemExit) as ended:
            parse_run_config(options)
        assert ended.value.code == 0
    elif command in ("train", "debug"):
        parse_run_config(options)
    elif command == "rank":
        parse_run_config(options[2:] if options[0] == "--strategy" else options)
    elif command in ("launch", "submit"):
        assert main([command, *options, "--dry_run"]) == 0
        assert capsys.readouterr().out
    elif command == "run":
        (tmp_path / "train.py").write_text("print('ran')\n")
        script = ["train.py" if word.endswith(".py") else word for word in options]
        script = ["--dry_run", *script] if "--strategy" in options else script
        done = run(harness("run", *script), tmp_path, extra={"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"})
        assert done.code == 0, done.output
        assert ("accelerate launch" if "--strategy" in options else "ran\n") in done.output
    else:
        assert command == "sync" and "--watch" in options, f"no test runs {line!r}"


@pytest.mark.parametrize("line", [line for line in LINES if not harness_words(line) and line not in ON_A_RUN])
def test_other_commands_name_what_exists(line: str) -> None:
    words = words_of(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\w+", words[-1])) <= set(extras)
    elif words[0] == "sbatch":
        assert all((ROOT / word).exists() for word in words if word.endswith((".sbatch", ".yaml")))
    elif words[0] == "kill":
        assert words[1] == "-USR2"
    else:
        assert words[0] in OTHERS, f"no test knows {line!r}"


def test_yaml_of_the_pages_is_a_valid_configuration(tmp_path: Path) -> None:
    for page in PAGES:
        for number, text in enumerate(blocks(page, "yaml")):
            path = tmp_path / f"{page.stem}-{number}.yaml"
            task = "" if "task:" in text else "task: {class_path: harness.tasks.Digits}\n"
            path.write_text(task + text)
            parse_run_config(["--config", str(path)])
