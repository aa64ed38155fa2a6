from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.errors import ConfigError, LaunchError
from launch.local import STRATEGIES, LaunchPlan, accelerate_command, data_dir, launch
from launch.run import run

ROOT = Path(__file__).resolve().parents[3]
DIGITS = str(ROOT / "configs" / "digits.yaml")
WORDS = ("--config", "configs/digits.yaml", "--seed", "3")
STARTS_RANK = [
    "--no_python",
    sys.executable,
    "-u",
    str(ROOT / "harness" / "io" / "child_process.py"),
    "launch.cli",
    "train",
]

# The content of each strategy's file for accelerate.
EXPECTED: dict[str, dict[str, Any]] = {
    "single": {"distributed_type": "NO"},
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp2": {"distributed_type": "FSDP"},
    "hsdp": {"distributed_type": "FSDP"},
    "zero1": {"distributed_type": "DEEPSPEED"},
    "zero2": {"distributed_type": "DEEPSPEED"},
    "zero3": {"distributed_type": "DEEPSPEED"},
}


def plan(strategy: str, count: int, port: int = 0) -> LaunchPlan:
    return LaunchPlan(strategy, count, port, WORDS)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_command_names_the_strategys_file_when_the_count_is_right(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    count = 1 if strategy == "single" else 4
    command = accelerate_command(plan(strategy, count, 29500))
    assert command[:2] == ["accelerate", "launch"]
    assert option(command, "--num_processes") == str(count)
    assert option(command, "--main_process_port") == "29500"
    assert command[command.index("--no_python") :] == [*STARTS_RANK, *WORDS]
    path = Path(option(command, "--config_file"))
    assert path == data_dir("configs") / "accelerate" / f"{strategy}.yaml"
    content = yaml.safe_load(path.read_text())
    assert content["distributed_type"] == EXPECTED[strategy]["distributed_type"]
    assert content.get("use_cpu") is False  # true would start one process without an error
    if strategy.startswith("zero"):
        assert content["deepspeed_config"]["zero_stage"] == int(strategy[-1])
    if strategy in ("fsdp2", "hsdp"):
        assert content["fsdp_config"]["fsdp_version"] == 2


def test_every_strategy_is_tested_when_one_is_added() -> None:
    assert set(EXPECTED) == set(STRATEGIES)


@pytest.mark.parametrize("count", [4, 6, 8])
def test_mesh_covers_all_processes_when_hsdp(count: int) -> None:
    command = accelerate_command(plan("hsdp", count))
    replicas = int(option(command, "--parallelism_config_dp_replicate_size"))
    shards = int(option(command, "--parallelism_config_dp_shard_size"))
    assert (replicas, replicas * shards) == (2, count)
    assert command.index("--parallelism_config_dp_shard_size") < command.index("--no_python")


def test_single_file_is_used_when_ddp_has_one_process() -> None:
    assert option(accelerate_command(plan("ddp", 1)), "--config_file").endswith("single.yaml")


def test_path_is_relative_when_below_the_working_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert option(accelerate_command(plan("ddp", 2)), "--config_file") == "configs/accelerate/ddp.yaml"


@pytest.mark.parametrize(
    ("strategy", "count", "expected"),
    [
        *[(strategy, 0, "must be at least 1, got 0") for strategy in STRATEGIES],
        ("ddp", -2, "must be at least 1, got -2"),
        ("single", 2, "single is one process, got 2"),
        *[(strategy, 1, "needs at least 2, got 1") for strategy in ("fsdp2", "zero1", "zero2", "zero3")],
        *[("hsdp", count, f"even number of at least 4.*got {count}") for count in (1, 2, 3, 5)],
    ],
)
def test_error_has_rule_and_count_when_the_count_is_wrong(strategy: str, count: int, expected: str) -> None:
    with pytest.raises(LaunchError, match=rf"^--num_processes: .*{expected}") as caught:
        accelerate_command(plan(strategy, count))
    assert caught.value.exit_code == 2


def test_command_is_printed_alone_when_dry(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", DIGITS, "--strategy", "fsdp2", "--num_processes", "2", "--dry_run", "--seed", "3"]
    assert launch(words) == 0
    (line,) = capsys.readouterr().out.splitlines()
    command = shlex.split(line)
    assert command[command.index("--no_python") :] == [*STARTS_RANK, "--config", DIGITS, "--seed", "3"]
    assert option(command, "--num_processes") == "2"


@pytest.mark.parametrize("command", [launch, run], ids=["launch", "run"])
def test_command_succeeds_when_the_reader_of_its_output_is_gone(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[list[str]], int]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        own = ["--num_processes", "2", "--dry_run"]
        assert command([*own, __file__] if command is run else [*own, "--config", DIGITS]) == 0
        monkeypatch.undo()


def test_one_process_is_the_default_when_single(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["--strategy", "single", "--config", DIGITS, "--dry_run"]) == 0
    assert "--num_processes 1 " in capsys.readouterr().out


def test_nothing_is_started_when_the_configuration_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        launch(["--config", DIGITS, "--trainer.max_epochs", "0", "--dry_run"])
    assert capsys.readouterr().out == ""


def test_error_names_the_port_when_it_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--main_process_port: {port} is in use"):
            launch(["--config", DIGITS, "--num_processes", "2", "--main_process_port", str(port)])


def test_secrets_are_left_out_when_the_command_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    secret = ("--task.init_args", '{"password": "hunter2"}', "--tracking.tags", '{"hf_token": "hunter3"}')
    launch(["--dry_run", "--config", DIGITS, *secret])
    output = capsys.readouterr().out
    assert "hunter" not in output
    assert "--tracking.tags" in output
