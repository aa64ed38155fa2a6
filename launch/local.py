"""`harness launch`: several processes on this machine, by the accelerate command that it prints."""

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
    """What is to be started.

    Args:
        strategy: one of `STRATEGIES`.
        num_processes: ranks on this machine.
        main_process_port: where the ranks meet; 0: a free one.
        training_words: the options of the configuration.
        max_restarts: how often all ranks are started again after one has failed; the run goes on.
        command: what each rank runs: ``train``, or ``run``.
    """

    strategy: str
    num_processes: int
    main_process_port: int
    training_words: tuple[str, ...]
    max_restarts: int = 0
    command: str = "train"


def launch(words: Sequence[str]) -> int:
    """Check everything that can be checked here, print the command, and become it.

    Raises:
        HarnessError: if a value is wrong or the port is taken.
    """
    plan, dry_run = _parse(words)
    # A wrong configuration is told here, once, and not by N ranks under a launcher's traceback.
    config = parse_run_config(plan.training_words, prog="harness launch")
    command = accelerate_command(plan)
    write_output(f"{shlex.join(redact_words(command))}\n")
    if dry_run:
        return EXIT_DONE
    if plan.main_process_port:
        require_free(plan.main_process_port)
    check_classes(config)
    environment = {**os.environ, NUM_PROCESSES_VARIABLE: str(plan.num_processes)}
    executable = Path(sys.executable).with_name("accelerate")
    os.execve(executable, [str(executable), *command[1:]], environment)


def check_classes(config: RunConfig) -> None:
    """Import the classes that the configuration names and check their arguments (this takes torch).

    Raises:
        ConfigError: as each rank would, but once, and with the exit code that it should have.
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
    parser.add_argument("--main_process_port", type=int, default=0, help="default: a free one")
    parser.add_argument("--max_restarts", type=int, default=0, help="start all ranks again when one fails, so often")
    parser.add_argument("--dry_run", action="store_true", help="only print the command")
    own, rest = parser.parse_known_args(list(words))
    count = own.num_processes
    if count is None:
        count = 1 if own.strategy == "single" else _default_num_processes()
    return LaunchPlan(own.strategy, count, own.main_process_port, tuple(rest), own.max_restarts), own.dry_run


def accelerate_command(plan: LaunchPlan) -> list[str]:
    """The `accelerate launch` command line of a plan.

    Raises:
        LaunchError: if the strategy cannot run on so many processes.
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
        # torch's agent would leave a torchelastic_* in /tmp for every run. What ranks print goes to the terminal.
        *(("--log_dir", os.devnull) if count > 1 else ()),
        *extra,
        *("--no_python", *_rank_command(plan.command), *plan.training_words),
    ]


def _rank_command(command: str) -> list[str]:
    """What starts a rank: `harness COMMAND`, whatever lies in the working directory."""
    python, *words = child_command("launch.cli", command)
    # As torch starts a rank that it knows to be Python's: what it prints is seen at once.
    return [python, "-u", *words]


def data_dir(name: str) -> Path:
    """The directory ``configs/`` or ``slurm/``: of the checkout, or as it was installed with the package.

    Raises:
        LaunchError: if there is none.
    """
    here = Path(__file__).resolve().parent
    # A directory of that name may be something else's, above an installed package.
    marks = {"configs": "accelerate", "slurm": "train.sbatch"}
    for candidate in (here.parent / name, here / name):
        if (candidate / marks[name]).exists():
            return candidate
    raise LaunchError(f"there is no {name}/{marks[name]} beside {here}; reinstall harness")


def _short(path: Path) -> str:
    """The path as one would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _default_num_processes() -> int:
    # Devices by their files: importing torch to count them would take seconds.
    num_gpus = len([name for name in os.listdir("/dev") if name.startswith("nvidia") and name[6:].isdigit()])
    return num_gpus or 2


def require_free(port: int) -> None:
    """Refuse a port that is in use.

    Raises:
        ConfigError: with what to do.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OverflowError as error:
            raise ConfigError("--main_process_port", f"must be from 0 to 65535, got {port}") from error
        except OSError as error:
            raise ConfigError(
                "--main_process_port", f"{port} is in use ({error.strerror}); leave it out for a free one"
            ) from error
