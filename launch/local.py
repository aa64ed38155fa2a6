"""Implement `harness launch`: start several processes on this machine with accelerate, and print the command."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.parsing import parse_run_config
from harness.config.schema import NUM_PROCESSES_VARIABLE, RunConfig
from harness.errors import EXIT_DONE, ConfigError, LaunchError
from harness.io.child_process import child_command
from harness.io.redact import redact_words
from harness.io.standard_streams import write_output
from launch.command_parser import CommandParser

STRATEGIES = ("single", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class LaunchPlan:
    """The processes to start.

    Args:
        strategy: one of `STRATEGIES`.
        main_process_port: port of the rendezvous; 0 for a free one.
        training_words: arguments of each rank's subcommand.
        max_restarts: how often all ranks are restarted, and resume, after one has failed.
        command: subcommand of each rank, ``train`` or ``run``.
    """

    strategy: str
    num_processes: int
    main_process_port: int
    training_words: tuple[str, ...]
    max_restarts: int = 0
    command: str = "train"


def launch(words: Sequence[str]) -> int:
    """Check the configuration, print the accelerate command and replace this process by it.

    Raises:
        HarnessError: if a value is wrong or the port is in use.
    """
    plan, dry_run = _parse(words)
    # Checked here, so that an error is one line and not N tracebacks.
    config = parse_run_config(plan.training_words, prog="harness launch")
    return start_ranks(plan, config, dry_run=dry_run)


def start_ranks(plan: LaunchPlan, config: RunConfig | None, *, dry_run: bool) -> int:
    """Print the accelerate command and, unless `dry_run`, replace this process by it.

    The classes of a configuration are imported and checked first; a script has none.

    Raises:
        HarnessError: if a value is wrong or the port is in use.
    """
    command = accelerate_command(plan)
    write_output(f"{shlex.join(redact_words(command))}\n")
    if dry_run:
        return EXIT_DONE
    if plan.main_process_port:
        _require_free(plan.main_process_port)
    if config is not None:
        check_classes(config)
    environment = {**os.environ, NUM_PROCESSES_VARIABLE: str(plan.num_processes)}
    executable = Path(sys.executable).with_name("accelerate")
    os.execve(executable, [str(executable), *command[1:]], environment)


def check_classes(config: RunConfig) -> None:
    """Import the classes that the configuration names and check their arguments.

    Effects: imports torch (seconds).

    Raises:
        ConfigError: the error that each rank would raise.
    """
    from harness.config.instantiate import check_arguments, check_optimization

    check_arguments("task", config.task)
    check_optimization(config)


def _parse(words: Sequence[str]) -> tuple[LaunchPlan, bool]:
    parser = CommandParser(
        prog="harness launch",
        allow_abbrev=False,
        description="Start several processes on this machine; all other options are those of `harness train --help`.",
    )
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    parser.add_argument("--num_processes", type=int, default=None, help="default: one for each GPU, else 2")
    parser.add_argument("--main_process_port", type=int, default=0, help="default: a free port")
    parser.add_argument("--max_restarts", type=int, default=0, help="how often all ranks are restarted after a failure")
    parser.add_argument("--dry_run", action="store_true", help="only print the command")
    own, rest = parser.parse_known_args(list(words))
    count = own.num_processes
    if count is None:
        count = 1 if own.strategy == "single" else _default_num_processes()
    return LaunchPlan(own.strategy, count, own.main_process_port, tuple(rest), own.max_restarts), own.dry_run


def accelerate_command(plan: LaunchPlan) -> list[str]:
    """Return the `accelerate launch` command line of a plan.

    Raises:
        LaunchError: if the strategy cannot run on the number of processes.
    """
    strategy, count = plan.strategy, plan.num_processes
    if count < 1:
        raise LaunchError(f"--num_processes: must be at least 1, got {count}")
    if strategy == "single" and count > 1:
        raise LaunchError(f"--num_processes: --strategy single is one process, got {count}; use ddp")
    if strategy == "ddp" and count == 1:
        strategy = "single"  # accelerate refuses a single process otherwise
    extra: list[str] = []
    if strategy == "hsdp":
        if count < 4 or count % 2:
            raise LaunchError(
                f"--num_processes: hsdp needs an even number of at least 4 (2 replicas of 2 shards), got {count}; "
                "use fsdp2"
            )
        extra = ["--parallelism_config_dp_replicate_size", "2"]
        extra += ["--parallelism_config_dp_shard_size", str(count // 2)]
    elif strategy != "single" and count < 2:
        raise LaunchError(f"--num_processes: {strategy} needs at least 2, got {count}; use --strategy single")
    config_file = data_dir("configs") / "accelerate" / f"{strategy}.yaml"
    return [
        *("accelerate", "launch", "--config_file", _short(config_file)),
        *("--num_processes", str(count), "--main_process_port", str(plan.main_process_port)),
        *(("--max_restarts", str(plan.max_restarts)) if plan.max_restarts else ()),
        # By default torch's agent leaves a directory torchelastic_* in /tmp for every run. Ranks print to the terminal.
        *(("--log_dir", os.devnull) if count > 1 else ()),
        *extra,
        *("--no_python", *_rank_command(plan.command), *plan.training_words),
    ]


def _rank_command(command: str) -> list[str]:
    """Return the command of a rank, which no module in the working directory can shadow."""
    python, *words = child_command("launch.cli", command)
    # Unbuffered, as torch starts a rank that it knows to be Python.
    return [python, "-u", *words]


def data_dir(name: str) -> Path:
    """Return the directory ``configs/`` or ``slurm/`` of the checkout or of the installed package.

    Raises:
        LaunchError: if it is missing.
    """
    here = Path(__file__).resolve().parent
    # Beside an installed package, a directory of that name may belong to another project.
    contents = {"configs": "accelerate", "slurm": "train.sbatch"}
    for candidate in (here.parent / name, here / name):
        if (candidate / contents[name]).exists():
            return candidate
    raise LaunchError(f"there is no {name}/{contents[name]} beside {here}; reinstall harness")


def _short(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _default_num_processes() -> int:
    # Counted by their device files, because importing torch takes seconds.
    num_gpus = len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])
    return num_gpus or 2


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError as error:
            raise ConfigError("--main_process_port", f"must be from 0 to 65535, got {port}") from error
        except OSError as error:
            raise ConfigError(
                "--main_process_port", f"{port} is in use ({error.strerror}); leave it out for a free one"
            ) from error
