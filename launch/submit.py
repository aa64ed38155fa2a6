"""`harness submit`: fills in slurm/train.sbatch, or array.sbatch, and gives it to SLURM."""

from __future__ import annotations

import difflib
import itertools
import math
import re
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
from launch.sweep import check_sweep

_LEAD_S = 300
# What sbatch calls otherwise, and what is no choice here.
_OWN = {
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
    """Render the script; print it, or submit it and say how to follow it.

    Raises:
        HarnessError: if an option is wrong, or SLURM refuses the job.
    """
    submission, config, dry_run = _parse(words)
    script = render(submission)
    if dry_run:
        print(script, end="")
        return EXIT_DONE
    if (sbatch := shutil.which("sbatch")) is None:
        raise LaunchError("sbatch is not here: submit from a node of the cluster; --dry_run prints the script")
    check_classes(config)
    path = Path(submission.run_dir) / "slurm" / f"{submission.name}.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", opener=open_private) as file:
        file.write(script)
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"sbatch refuses it: {' '.join(done.stderr.split())} ({path})")
    write_output(f"{told(submission, path, done.stdout.strip().partition(';')[0])}\n")
    return EXIT_DONE


def told(submission: Submission, script: Path, job_id: str) -> str:
    """What was submitted, and the commands to follow, stop and cancel it."""
    log = submission.log.replace("%j", job_id).replace("%A", job_id).replace("%a", "0")
    ranks = "-".join(str(count * submission.tasks_per_node) for count in num_nodes(submission.nodes))
    what = f"{submission.nodes} node{'s' * (submission.nodes != '1')}, {ranks} rank{'s' * (ranks != '1')}"
    # A task of an array has a run of its own, named after both (slurm/train.sbatch).
    runs = f"{submission.name}-{job_id}_0" if submission.array else submission.name
    rows = {
        "job": f"{job_id}: {submission.name}, {what}, {submission.strategy}, {submission.time}"
        + (f", array {submission.array}" if submission.array else ""),
        "script": str(script),
        "log": log,
        "follow": f"tail -F {log}",
        "state": f"squeue -j {job_id}",
        "stop": f"harness stop {submission.run_dir}/{runs}        (saves first)",
        "cancel": f"scancel {job_id}",
    }
    return "\n".join(f"{name:8}{value}" for name, value in rows.items())


def _parse(words: Sequence[str]) -> tuple[Submission, RunConfig, bool]:
    parser = CommandParser(
        prog="harness submit",
        allow_abbrev=False,
        description="Submit a training to SLURM; all other options are those of `harness train --help`.",
    )
    parser.add_argument("--nodes", default="1", metavar="N", help="or MIN-MAX: as many as are free at each start")
    parser.add_argument("--gpus_per_node", type=int, default=0, help="one rank for each; 0: none (--tasks_per_node)")
    parser.add_argument("--tasks_per_node", type=int, default=None, help="ranks on a node; default: its GPUs, else 1")
    parser.add_argument("--cpus_per_task", type=int, default=4, help="cores for each rank (%(default)s)")
    parser.add_argument("--time", required=True, metavar="T", help="limit of the job, such as 04:00:00")
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--lead_s", type=int, default=_LEAD_S, help="it is asked to stop so long before (%(default)s)")
    for name in ("partition", "account", "qos"):
        parser.add_argument(f"--{name}", default=None)
    parser.add_argument(
        "--array", default=None, metavar="INDICES", help="the tasks, such as 0-3%%2; default: all of --sweep"
    )
    parser.add_argument("--sweep", type=Path, default=None, metavar="FILE", help="the options of each task, one a line")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other, such as mem=64G")
    parser.add_argument("--dry_run", action="store_true", help="only print the script")
    own, rest = parser.parse_known_args(list(words))
    _refuse_unknown(rest, [action for each in parser._actions for action in each.option_strings])
    config = parse_run_config(rest, prog="harness submit")
    if config.resume_from_checkpoint == "never":
        raise ConfigError(
            "resume_from_checkpoint",
            "never would refuse the run when the job is queued again; another run_name begins one",
        )
    if own.array is not None and own.sweep is None:
        raise ConfigError("--array", "goes with --sweep, a file with a line of options for each task")
    array = None if own.sweep is None else check_sweep(own.sweep, own.array, rest)
    for name, least in (("gpus_per_node", 0), ("tasks_per_node", 1), ("cpus_per_task", 1), ("lead_s", 1)):
        if (value := getattr(own, name)) is not None and value < least:
            raise ConfigError(f"--{name}", f"must be at least {least}, got {value}")
    tasks_per_node = own.tasks_per_node or own.gpus_per_node or 1
    if 0 < own.gpus_per_node < tasks_per_node:
        raise ConfigError("--tasks_per_node", f"each rank needs a GPU: {tasks_per_node} on {own.gpus_per_node}")
    for count in num_nodes(own.nodes):
        ranks = count * tasks_per_node
        try:
            # One rank has nothing to divide: `harness rank` takes it for single.
            accelerate_command(LaunchPlan(own.strategy if ranks > 1 else "single", ranks, 0, ()))
        except LaunchError as error:
            reason = str(error).removeprefix("--num_processes: ")
            raise ConfigError("--nodes, --tasks_per_node", f"{ranks} ranks: {reason}") from error
    _check_lead(own.time, own.lead_s)
    name = config.run_name or f"{_stem(rest)}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_run_name(name)
    options = {name: getattr(own, name) for name in ("partition", "account", "qos") if getattr(own, name) is not None}
    for option in own.sbatch:
        key, equals, value = option.removeprefix("--").partition("=")
        if key in _OWN:
            raise ConfigError("--sbatch", f"{key} has an option of its own here: {_OWN[key]}")
        options[key] = value if equals else None
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
        options=options,
        array=array,
        sweep=own.sweep,
        training_words=tuple(_without(rest, ("--run_name", "--run_dir"))),
    )
    return submission, config, own.dry_run


def limit_s(text: str) -> float:
    """Seconds in a time limit as SLURM takes it.

    Raises:
        ConfigError: if SLURM would not take it.
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
        raise ConfigError("--time", f"must be longer than nothing, got {text!r}; UNLIMITED is none")
    # With days the first is hours; without, what stands last is seconds, or minutes where it stands alone.
    units = (3600, 60, 1) if days or len(numbers) == 3 else (60, 1)
    return 86_400 * int(days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))


def _check_lead(time_limit: str, lead_s: int) -> None:
    if lead_s > limit_s(time_limit) / 2:
        raise ConfigError(
            "--lead_s",
            f"{lead_s} s is more than half of --time {time_limit}: it would stop when it has hardly begun; give a "
            "shorter one, or a longer --time",
        )


def _refuse_unknown(words: Iterable[str], own: Sequence[str]) -> None:
    """An option that neither this command nor the configuration knows, with those that are valid here.

    Raises:
        ConfigError: with the nearest one.
    """
    training = {option for action in make_parser("harness submit")._actions for option in action.option_strings}
    for word in words:
        option = word.partition("=")[0]
        # A dotted one is the configuration's affair, which knows what is near.
        if not option.startswith("--") or "." in option or option in training:
            continue
        near = difflib.get_close_matches(option, [*own, *training], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        valid = " ".join(sorted(each for each in own if each.startswith("--")))
        raise ConfigError(
            "", f"{option}: there is no such option; {hint}Valid are {valid}, and those of `harness train`"
        )


def _without(words: Iterable[str], options: Sequence[str]) -> list[str]:
    """The words without these options and their values: the script gives them."""
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
    """What a name that is made up begins with: the last configuration file's."""
    found = [after for before, after in itertools.pairwise(words) if before == "--config"]
    found += [word.partition("=")[2] for word in words if word.startswith("--config=")]
    return re.sub(r"[^A-Za-z0-9_-]", "-", Path(found[-1]).stem) if found else "run"
