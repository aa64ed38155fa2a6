"""The batch scripts of `harness submit`, without SLURM. HARNESS_WRITE_GOLDEN=1 writes the golden files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import ConfigError, LaunchError
from launch.local import data_dir
from launch.submit import indices_of, limit_s, submit

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent / "golden"
SWEEP = GOLDEN.relative_to(ROOT) / "sweep.txt"
CASES = {
    "one-gpu": ("--config", "configs/digits.yaml", "--gpus_per_node", "1", "--time", "1:00:00", "--run_name", "it"),
    "two-nodes": (
        *("--config", "configs/byte_lm.yaml", "--run_name", "big", "--run_dir", "/shared/runs", "--nodes", "2"),
        *("--gpus_per_node", "8", "--time", "2-0", "--strategy", "fsdp2", "--partition", "a100", "--account", "vision"),
        *("--qos", "high", "--sbatch", "mem=0", "--sbatch", "exclusive", "--lead_s", "600"),
        *("--tracking.tags", "{team: 'a b'}"),
    ),
    "as-many-nodes-as-are-free": (
        *("--config", "configs/byte_lm.yaml", "--run_name", "big", "--run_dir", "/shared/our runs", "--nodes", "1-4"),
        *("--gpus_per_node", "4", "--time", "1:30:00", "--strategy", "zero2"),
        *("--sbatch", 'comment=for "us" # all', "--sbatch", "output=/logs/%j.txt"),
    ),
    "array": (
        *("--config", "configs/digits.yaml", "--run_name", "sweep", "--array", "0-2%2", "--sweep", str(SWEEP)),
        *("--tasks_per_node", "2", "--cpus_per_task", "1", "--time", "30"),
    ),
}


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", CASES)
def test_script_equals_the_golden_file_when_rendered(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([*CASES[name], "--dry_run"]) == 0
    # What depends on where this is installed.
    script = capsys.readouterr().out.replace(str(Path(sys.executable).parent), "BIN").replace(str(ROOT), "ROOT")
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("HARNESS_WRITE_GOLDEN") == "1":
        path.write_text(script)
    assert path.is_file(), f"there is no golden file {path}"
    assert script == path.read_text()


@pytest.mark.parametrize("path", [*GOLDEN.glob("*.sbatch"), *data_dir("slurm").glob("*.sbatch")], ids=str)
def test_script_is_valid_bash_when_checked(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--partion", "x"), r"--partion: there is no such option; did you mean --partition\? Valid are .*--account"),
        (("--trainer.max_epoch", "3"), "did you mean trainer.max_epochs"),
        (("--nodes", "0"), "--nodes: must be a number of at least 1, or MIN-MAX, got '0'"),
        (("--nodes", "3-2"), "--nodes: must be"),
        (("--nodes", "two"), "--nodes: must be"),
        (("--gpus_per_node", "-1"), "--gpus_per_node: must be at least 0, got -1"),
        (("--gpus_per_node", "2", "--tasks_per_node", "0"), "--tasks_per_node: must be at least 1, got 0"),
        (("--gpus_per_node", "2", "--tasks_per_node", "4"), "--tasks_per_node: each rank needs a GPU: 4 on 2"),
        (("--gpus_per_node", "1", "--nodes", "2", "--strategy", "hsdp"), "hsdp needs an even number of at least 4"),
        (("--sbatch", "time=4:00:00"), "--sbatch: time is set by an option of harness submit: --time"),
        (("--time", "soon"), "--time: must be minutes"),
        (("--time", ""), "--time: must be minutes"),
        (("--time", "1:2:3:4"), "--time: must be minutes"),
        (("--time", "-5"), "--time: must be minutes"),
        (("--time", "0"), "--time: must be longer than 0"),
        (("--time", "5"), "--lead_s: 300 s is more than half"),
        (("--array", "0-3"), "--array: needs --sweep"),
        (("--resume_from_checkpoint", "never"), "never would fail when the job is requeued"),
        (("--sweep", "nowhere.txt", "--array", "0-3"), "--sweep: there is no file nowhere.txt"),
        (("--sweep", str(SWEEP), "--array", "first"), "--array: must be such as 0-3"),
        (("--sweep", str(SWEEP), "--array", "1-3"), "has no line for task 3: task 0 has the first of 3"),
        (("--strategy", "fsdp1"), "invalid choice: 'fsdp1'"),
        (("--run_name", "a b"), "run_name: must be letters"),
    ],
)
def test_error_names_the_valid_options_when_one_is_wrong(words: tuple[str, ...], reason: str) -> None:
    time_limit = () if "--time" in words else ("--time", "1:00:00")
    with pytest.raises(ConfigError, match=reason):
        submit(["--config", "configs/digits.yaml", *time_limit, *words, "--dry_run"])


def test_error_names_the_line_when_a_sweep_has_a_wrong_option(tmp_path: Path) -> None:
    path = tmp_path / "sweep.txt"
    path.write_text("--seed 1\n--seed 2 --trainer.max_epoch 3\n")
    words = ["--config", "configs/digits.yaml", "--time", "1:00:00", "--sweep", str(path), "--dry_run"]
    with pytest.raises(ConfigError, match=r"sweep.txt, line of task 1: .*did you mean trainer.max_epochs"):
        submit(words)
    path.write_text("--seed '1\n")
    with pytest.raises(ConfigError, match="line of task 0: No closing quotation"):
        submit(words)


@pytest.mark.parametrize(
    ("text", "indices"),
    [("0", [0]), ("0-3", [0, 1, 2, 3]), ("0-9:4", [0, 4, 8]), ("1,5-6", [1, 5, 6]), ("2-3%1", [2, 3])],
)
def test_indices_are_those_of_slurm_when_parsed(text: str, indices: list[int]) -> None:
    assert indices_of(text) == indices


@pytest.mark.parametrize("text", ["", "1-", "a", "0-3%", "0-3%x", "0-3:0", "0:2"])
def test_indices_are_refused_when_slurm_would_reject_them(text: str) -> None:
    with pytest.raises(ConfigError, match="--array: must be such as"):
        indices_of(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("1:00:00", 3600), ("2-0", 172_800), ("1-1:30", 91_800), ("0-0:0:5", 5)],
)
def test_limit_is_that_of_slurm_when_parsed(text: str, seconds: float) -> None:
    assert limit_s(text) == seconds


def test_limit_is_infinite_when_unlimited() -> None:
    assert limit_s("UNLIMITED") == float("inf")


def test_error_has_the_remedy_when_sbatch_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="print the script with --dry_run"):
        submit(["--config", "configs/digits.yaml", "--time", "1:00:00"])


def test_sbatchs_reason_is_reported_when_it_rejects_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "sbatch"
    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["--config", "configs/digits.yaml", "--time", "1:00:00", "--partition", "x"]
    with pytest.raises(LaunchError, match="sbatch rejects the job: sbatch: error: invalid partition specified: x"):
        submit([*words, "--run_dir", str(tmp_path / "runs"), "--run_name", "it"])
    assert "#SBATCH --partition=x" in (tmp_path / "runs/slurm/it.sbatch").read_text()
