"""What SLURM's ranks are told of a strategy is what `accelerate launch` tells its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import LaunchError
from launch.local import Plan, accelerate_command
from launch.strategy_environment import strategy_environment

PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
PRINTS = "import json, os; print('ENV' + json.dumps(dict(os.environ)))\n"
# What its launcher adds for itself, and nobody reads.
OF_THE_LAUNCHER = {"ACCELERATE_RECIPE_NAME"}


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2", "hsdp", "zero3"])
def test_ranks_are_told_what_accelerate_tells_its_own(strategy: str, tmp_path: Path) -> None:
    count = {"single": 1, "hsdp": 4}.get(strategy, 2)
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    command = accelerate_command(Plan(strategy, count, 0, ()))
    launcher = Path(sys.executable).with_name("accelerate")
    words = [launcher, *command[1 : command.index("-m")], script]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(PREFIXES)}
    done = subprocess.run(words, env=clean, capture_output=True, text=True, timeout=120, check=True)
    line = next(line for line in done.stdout.splitlines() if "ENV{" in line)
    told = json.JSONDecoder().raw_decode(line[line.index("ENV{") + 3 :])[0]
    expected = {name: value for name, value in told.items() if name.startswith(PREFIXES)}
    found = {name: value for name, value in strategy_environment(strategy, count).items() if name in expected}
    assert found == {name: value for name, value in expected.items() if name not in OF_THE_LAUNCHER}


def test_error_is_told_when_a_strategy_cannot_run_on_so_many() -> None:
    with pytest.raises(LaunchError, match="hsdp needs an even number"):
        strategy_environment("hsdp", 3)
