"""The variables of a strategy that `harness rank` sets are those that `accelerate launch` sets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import LaunchError
from launch.local import LaunchPlan, accelerate_command
from launch.rank import strategy_environment

PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
PRINTS = "import json, os; print('ENV' + json.dumps(dict(os.environ)))\n"
# Runs `accelerate launch` for each strategy after one import; output goes to a file each.
LAUNCHES = """\
import json, os, sys
import torch.distributed.run
from accelerate.commands.accelerate_cli import main

for path, words in json.load(sys.stdin).items():
    if os.fork() == 0:
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), 1)
        sys.argv = ["accelerate", *words]
        main()
        os._exit(0)
    _, status = os.wait()
    assert status == 0, (path, status)
"""
NUM_PROCESSES = {"single": 1, "ddp": 2, "fsdp2": 2, "hsdp": 4, "zero3": 2}
# Added by the launcher for itself; no rank reads it.
LAUNCHER_ONLY = {"ACCELERATE_RECIPE_NAME"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the environment that ranks of each strategy print."""
    directory = tmp_path_factory.mktemp("printed")
    (script := directory / "prints.py").write_text(PRINTS)
    words = {}
    for strategy, count in NUM_PROCESSES.items():
        command = accelerate_command(LaunchPlan(strategy, count, 0, ()))
        words[str(directory / strategy)] = [*command[1 : command.index("--no_python")], str(script)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    launches = [sys.executable, "-c", LAUNCHES]
    subprocess.run(launches, input=json.dumps(words), env=clean, text=True, timeout=240, check=True)
    return directory


@pytest.mark.parametrize("strategy", NUM_PROCESSES)
def test_environment_is_accelerates_own_when_slurm_starts_ranks(strategy: str, printed: Path) -> None:
    line = next(line for line in (printed / strategy).read_text().splitlines() if "ENV{" in line)
    printed_values = json.JSONDecoder().raw_decode(line[line.index("ENV{") + 3 :])[0]
    expected = {name: value for name, value in printed_values.items() if name.startswith(PREFIXES)}
    environment = strategy_environment(strategy, NUM_PROCESSES[strategy])
    found = {name: value for name, value in environment.items() if name in expected}
    assert found == {name: value for name, value in expected.items() if name not in LAUNCHER_ONLY}


def test_strategy_is_refused_when_it_cannot_run_on_the_ranks() -> None:
    with pytest.raises(LaunchError, match="hsdp needs an even number"):
        strategy_environment("hsdp", 3)
