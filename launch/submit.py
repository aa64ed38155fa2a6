"""Implement `harness submit`: check the options of a SLURM job, render its script and submit it."""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.config.parsing import make_parser, parse_run_config
from harness.config.schema import RunConfig, check_run_name
from harness.errors import EXIT_DONE, ConfigError, LaunchError
from harness.io.durable_files import open_private
from harness.io.standard_streams import write_output
from launch.command_parser import CommandParser
from launch.job_script import Submission, num_nodes, render
from launch.local import STRATEGIES, LaunchPlan, accelerate_command, check_classes

_LEAD_S = 300
# Options of sbatch that --sbatch refuses, and our options that set them.
_OWN_OPTIONS = {
    "job-name": "--run_name",
    "nodes": "--nodes",
    "ntasks-per-node": "--tasks_per_node",
    "ntasks": "--nodes and --tasks_per_node",
    "gpus-per-node": "--gpus_per_node",
    "cpus-per-task": "--cpus_per_task",
    "time": "--time",
    "array": "--array",
    "signal": "--lead_s",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
}


def submit(words: Sequence[str]) -> int:
    """Render the script, then print it, or submit it and print how to follow the job.

    Raises:
        HarnessError: if an option is wrong, or SLURM rejects the job.
    """
    submission, config, dry_run = _parse(words)
    script = render(submission)
    if dry_run:
        print(script, end="")
        return EXIT_DONE
    if (sbatch := shutil.which("sbatch")) is None:
        raise LaunchError(
            "sbatch is not on this machine; submit from a node of the cluster, or print the script with --dry_run"
        )
    check_classes(config)
    path = Path(submission.run_dir) / "slurm" / f"{submission.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", opener=open_private) as file:
        file.write(script)
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"sbatch rejects the job: {' '.join(done.stderr.split())} ({path})")
    write_output(f"{summary(submission, path, done.stdout.strip().partition(';')[0])}\n")
    return EXIT_DONE


def summary(submission: Submission, script: Path, job_id: str) -> str:
    """Return the job's figures and the commands that follow, stop and cancel it."""
    log = submission.log.replace("%j", job_id).replace("%A", job_id).replace("%a", "0")
    ranks = "-".join(str(count * submission.tasks_per_node) for count in num_nodes(submission.nodes))
    size = f"{submission.nodes} node{'s' * (submission.nodes != '1')}, {ranks} rank{'s' * (ranks != '1')}"
    # Each task of an array has its own run, named after both (slurm/train.sbatch).
    run = f"{submission.name}-{job_id}_0" if submission.array else submission.name
    rows = {
        "job": f"{job_id}: {submission.name}, {size}, {submission.strategy}, {submission.time}"
        + (f", array {submission.array}" if submission.array else ""),
        "script": str(script),
        "log": log,
        "follow": f"tail -F {log}",
        "state": f"squeue -j {job_id}",
        "stop": f"harness stop {submission.run_dir}/{run}        (saves first)",
        "cancel": f"scancel {job_id}",
    }
    return "\n".join(f"{name:8}{value}" for name, value in rows.items())


def _parse(words: Sequence[str]) -> tuple[Submission, RunConfig, bool]:
    parser = _make_parser()
    own, rest = parser.parse_known_args(list(words))
    _refuse_unknown(rest, [action for each in parser._actions for action in each.option_strings])
    config = parse_run_config(rest, prog="harness submit")
    if config.resume_from_checkpoint == "never":
        raise ConfigError(
            "resume_from_checkpoint",
            "never would fail when the job is requeued, because the run exists then; give another run_name instead",
        )
    if own.array is not None and own.sweep is None:
        raise ConfigError("--array", "needs --sweep, a file with a line of options for each task")
    array = None if own.sweep is None else check_sweep(own.sweep, own.array, rest)
    tasks_per_node = _check_resources(own)
    _check_lead(own.time, own.lead_s)
    name = config.run_name or f"{_stem(rest)}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_run_name(name)
    submission = Submission(
        name=name,
        run_dir=config.run_dir,
        strategy=own.strategy,
        nodes=own.nodes,
        tasks_per_node=tasks_per_node,
        gpus_per_node=own.gpus_per_node,
        cpus_per_task=own.cpus_per_task,
        time=own.time,
        lead_s=own.lead_s,
        options=_sbatch_options(own),
        array=array,
        sweep=own.sweep,
        training_words=tuple(_without(rest, ("--run_name", "--run_dir"))),
    )
    return submission, config, own.dry_run


def _make_parser() -> CommandParser:
    parser = CommandParser(
        prog="harness submit",
        allow_abbrev=False,
        description="Submit a training to SLURM; all other options are those of `harness train --help`.",
    )
    parser.add_argument("--nodes", default="1", metavar="N", help="or MIN-MAX: as many as are free at each start")
    parser.add_argument("--gpus_per_node", type=int, default=0, help="one rank for each; 0: none (--tasks_per_node)")
    parser.add_argument("--tasks_per_node", type=int, default=None, help="ranks on a node; default: its GPUs, else 1")
    parser.add_argument("--cpus_per_task", type=int, default=4, help="cores for each rank (%(default)s)")
    parser.add_argument("--time", required=True, metavar="T", help="time limit of the job, such as 04:00:00")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument(
        "--lead_s", type=int, default=_LEAD_S, help="seconds before the limit at which the job stops (%(default)s)"
    )
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", default=None)
    parser.add_argument(
        "--array", default=None, metavar="INDICES", help="tasks of the array, such as 0-3%%2; default: all of --sweep"
    )
    parser.add_argument("--sweep", type=Path, default=None, metavar="FILE", help="options of the tasks, one line each")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other, such as mem=64G")
    parser.add_argument("--dry_run", action="store_true", help="only print the script")
    return parser


def _check_resources(own: argparse.Namespace) -> int:
    """Check numbers of nodes, tasks and GPUs against the strategy, and return the tasks per node."""
    for name, least in (("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1), ("lead_s", 1)):
        if (value := getattr(own, name)) is not None and value < least:
            raise ConfigError(f"--{name}", f"must be at least {least}, got {value}")
    tasks_per_node: int = own.tasks_per_node or own.gpus_per_node or 1
    if 0 < own.gpus_per_node < tasks_per_node:
        raise ConfigError("--tasks_per_node", f"each rank needs a GPU: {tasks_per_node} on {own.gpus_per_node}")
    for count in num_nodes(own.nodes):
        ranks = count * tasks_per_node
        try:
            # `harness rank` runs a single rank with strategy single.
            accelerate_command(LaunchPlan(own.strategy if ranks > 1 else "single", ranks, 0, ()))
        except LaunchError as error:
            reason = str(error).removeprefix("--num_processes: ")
            raise ConfigError("--nodes, --tasks_per_node", f"{ranks} ranks: {reason}") from error
    return tasks_per_node


def _sbatch_options(own: argparse.Namespace) -> dict[str, str | None]:
    options = {name: getattr(own, name) for name in ("partition", "account", "qos") if getattr(own, name) is not None}
    for option in own.sbatch:
        key, equals, value = option.removeprefix("--").partition("=")
        if key in _OWN_OPTIONS:
            raise ConfigError("--sbatch", f"{key} is set by an option of harness submit: {_OWN_OPTIONS[key]}")
        options[key] = value if equals else None
    return options


def limit_s(text: str) -> float:
    """Convert a SLURM time limit to seconds.

    Raises:
        ConfigError: if SLURM would reject it.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days if dash else "0"]) or len(parts) > 3:
        raise ConfigError(
            "--time", f"must be minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes], got {text!r}"
        )
    numbers = [int(part) for part in parts]
    if not days and not any(numbers):
        raise ConfigError("--time", f"must be longer than 0, got {text!r}; use UNLIMITED for no limit")
    # With days, the first number is hours. Without, the last is seconds, or minutes if it is the only one.
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def _check_lead(time_limit: str, lead_s: int) -> None:
    if lead_s > limit_s(time_limit) / 2:
        raise ConfigError(
            "--lead_s",
            f"{lead_s} s is more than half of --time {time_limit}, so the job would stop soon after its start; give a "
            "shorter --lead_s or a longer --time",
        )


def indices_of(text: str) -> list[int]:
    """Return the task indices of a SLURM array: ``0-3,8-12:2%4`` -> 0, 1, 2, 3, 8, 10, 12.

    Raises:
        ConfigError: if the text has another form.
    """
    found: list[int] = []
    ranges, percent, limit = text.partition("%")
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", part)
        if match is None or (percent and not limit.isdigit()):
            raise ConfigError("--array", f"must be such as 0-3, 0-9:3, 1,5 or 0-99%4 (4 at once), got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1))
    return found


def check_sweep(path: Path, array: str | None, words: Sequence[str]) -> str:
    """Check that each task of an array has a line of valid options, and return the array's indices.

    Line n of the file, from 0, has the options of task n, in addition to the common `words`. Without `array` there is
    one task for each line.

    Raises:
        ConfigError: if the file is missing or empty, or a task's line is missing or wrong.
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


def _refuse_unknown(words: Iterable[str], own: Sequence[str]) -> None:
    """Refuse an option that is neither of this command nor of the configuration, and name the nearest one."""
    training = {option for action in make_parser("harness submit")._actions for option in action.option_strings}
    for word in words:
        option = word.partition("=")[0]
        # The configuration's parser checks dotted options.
        if not option.startswith("--") or "." in option or option in training:
            continue
        near = difflib.get_close_matches(option, [*own, *training], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        valid = " ".join(sorted(each for each in own if each.startswith("--")))
        raise ConfigError(
            "", f"{option}: there is no such option; {hint}Valid are {valid}, and those of `harness train`"
        )


def _without(words: Iterable[str], options: Sequence[str]) -> list[str]:
    """Return the words without these options and their values, which the job script sets."""
    kept: list[str] = []
    is_value = False
    for word in words:
        if is_value:
            is_value = False
        elif word in options:
            is_value = True
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def _stem(words: Sequence[str]) -> str:
    """Return the stem of the last configuration file, for a generated run name."""
    found = [after for before, after in itertools.pairwise(words) if before == "--config"]
    found += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return re.sub(r"[^A-Za-z0-9_-]", "-", Path(found[-1]).stem) if found else "run"
