"""A job array's indices, and the file with the options of each of its tasks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from harness.config.parsing import parse_run_config
from harness.errors import ConfigError


def indices_of(text: str) -> list[int]:
    """Numbers of the tasks in SLURM's form: ``0-3,8-12:2%4`` -> 0, 1, 2, 3, 8, 10, 12.

    Raises:
        ConfigError: if it is not of that form.
    """
    found: list[int] = []
    ranges, percent, at_once = text.partition("%")
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None or (percent and not at_once.isdigit()):
            raise ConfigError("--array", f"must be such as 0-3, 0-9:3, 1,5 or 0-99%4 (4 at once), got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    return found


def check_sweep(path: Path, array: str | None, words: Sequence[str]) -> str:
    """See to it that each task has its line, and that its options are valid; returns the array's indices.

    Args:
        path: the file; line n, from 0, has the options of task n.
        array: the tasks, in SLURM's form; None: one for each line.
        words: the options of all tasks.

    Raises:
        ConfigError: with the line.
    """
    if not path.is_file():
        raise ConfigError("--sweep", f"there is no file {path}")
    lines = path.read_text().splitlines()
    if not lines:
        raise ConfigError("--sweep", f"{path} is empty; give it a line of options for each task")
    if array is None:
        array = f"0-{len(lines) - 1}"
    for index in indices_of(array):
        if index >= len(lines) or not lines[index].strip():
            raise ConfigError("--sweep", f"{path} has no line for task {index}: task 0 has the first of {len(lines)}")
        try:
            parse_run_config([*words, *shlex.split(lines[index])], prog="harness submit")
        except (ConfigError, ValueError) as error:
            raise ConfigError("--sweep", f"{path}, line of task {index}: {error}") from error
    return array
