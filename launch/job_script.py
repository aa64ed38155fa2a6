"""Render the batch script of a SLURM job from slurm/train.sbatch or slurm/array.sbatch."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.errors import ConfigError
from launch.local import data_dir


@dataclass(frozen=True)
class Submission:
    """The options of a SLURM job; `nodes`, `time` and `array` are in SLURM's form.

    Args:
        name: name of the run's directory, the MLflow run and the job.
        run_dir: parent directory of the runs.
        nodes: ``2``, or ``1-4`` for as many as are free at each start.
        lead_s: seconds before the time limit at which the training stops.
        options: further ``#SBATCH`` lines, name -> value; None for an option without a value.
        array: indices of a job array; None for a single job.
        sweep: file with a line of options for each task of the array.
        training_words: the options of `harness train`.
    """

    name: str
    run_dir: str
    strategy: str
    nodes: str
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    time: str
    lead_s: int
    options: Mapping[str, str | None]
    array: str | None
    sweep: Path | None
    training_words: tuple[str, ...]

    @property
    def log(self) -> str:
        """Path of the job's log, with SLURM's placeholders."""
        return self.options.get("output") or f"{self.run_dir}/slurm/{self.name}-{'%A_%a' if self.array else '%j'}.log"


def render(submission: Submission) -> str:
    """Render the template with this job's ``#SBATCH`` lines, variables and arguments."""
    is_array = submission.array is not None
    source = data_dir("slurm") / ("array.sbatch" if is_array else "train.sbatch")
    lines = source.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    kept = [line for line in lines[start:] if not line.startswith("#SBATCH")]
    variables = {
        "HARNESS": str(Path(sys.executable).with_name("harness")),
        "HARNESS_RUN_DIR": submission.run_dir,
        "HARNESS_STOP_LEAD_S": str(submission.lead_s),
        "HARNESS_MIN_NODES": str(num_nodes(submission.nodes)[0]),
    }
    if is_array:
        variables["HARNESS_TRAIN"] = str(data_dir("slurm") / "train.sbatch")
        variables["HARNESS_PARENT"] = submission.name
    else:
        variables["HARNESS_RUN_NAME"] = submission.name
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    first = [str(submission.sweep)] if submission.sweep else []
    arguments = shlex.join([*first, "--strategy", submission.strategy, *submission.training_words])
    return "\n".join(
        [
            "#!/bin/bash",
            f"# Rendered by `harness submit` from slurm/{source.name}, for `sbatch`.",
            "",
            *(f"#SBATCH --{line}" for line in _sbatch_lines(submission)),
            "",
            *exports,
            f"set -- {arguments}",
            *_without_blank_start(kept),
            "",
        ]
    )


def _sbatch_lines(submission: Submission) -> Iterable[str]:
    lines: dict[str, str | None] = {
        "job-name": submission.name,
        "nodes": submission.nodes,
        "ntasks-per-node": str(submission.tasks_per_node),
        **({"gpus-per-node": str(submission.gpus_per_node)} if submission.gpus_per_node else {}),
        "cpus-per-task": str(submission.cpus_per_task),
        "time": submission.time,
        **({"array": submission.array} if submission.array else {}),
        "signal": f"B:USR1@{submission.lead_s}",
        "requeue": None,
        "open-mode": "append",
        "output": submission.log,
        **submission.options,
    }
    return (name if value is None else f"{name}={_quoted(value)}" for name, value in lines.items())


def _quoted(value: str) -> str:
    """Quote a value for sbatch, which ends a word at a space and a line at a #."""
    if not re.search(r"[\s#\"'\\\\]", value):
        return value
    return '"' + re.sub(r'(["\\\\])', r"\\\1", value) + '"'


def _without_blank_start(lines: list[str]) -> list[str]:
    while lines and not lines[0]:
        lines = lines[1:]
    return ["", *lines]


def num_nodes(text: str) -> list[int]:
    """Parse the number of nodes, or the minimum and the maximum.

    Raises:
        ConfigError: if the text is neither ``N`` nor ``MIN-MAX``.
    """
    parts = text.split("-")
    if not all(part.isdigit() for part in parts) or len(parts) > 2 or not 1 <= int(parts[0]) <= int(parts[-1]):
        raise ConfigError("--nodes", f"must be a number of at least 1, or MIN-MAX, got {text!r}")
    return [int(part) for part in parts]
