"""Implement `harness run SCRIPT [ARGS]`: run an unchanged Accelerate script or module with autologging.

The script runs in one process, or as one rank of a launcher; with `--num_processes` or `--strategy` the command is the
launcher. Arguments, `sys.path`, `__main__`, exit code and traceback are those of ``python SCRIPT ARGS`` or
``python -m MODULE ARGS``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from harness.autologging.api import autolog, resume
from harness.autologging.settings import first_run_of, script_name
from harness.distributed.launch_identity import is_launcher_rank_zero
from harness.errors import EXIT_DONE, ConfigError, HarnessError
from harness.io.standard_streams import write_error
from launch.command_parser import CommandParser
from launch.local import STRATEGIES, LaunchPlan, start_ranks
from launch.script import MODULE, find_script, run_script

_DESCRIPTION = """\
Run an unchanged Accelerate script, log its metrics and save a checkpoint every few epochs (docs/guides/any-script.md).

  harness run train.py --lr 0.1                                  one process
  harness run -m package.train --lr 0.1                          as python -m does
  harness run --strategy fsdp2 --num_processes 4 train.py        several: prints and executes the accelerate command
  accelerate launch --no_python harness run train.py             as a rank of your own launcher
"""
_FLAGS = ("-h", "--help", "--dry_run", "--reset_scheduler")


def run(words: Sequence[str]) -> int:
    """Run the script and return its exit code.

    Raises:
        HarnessError: if an option is wrong or the script does not exist.
        SystemExit: if the script raises it.
    """
    own_words, script_words = _split(words)
    own = _parse(own_words)
    if not script_words:
        raise ConfigError("", "harness run: give a script, or -m and a module, after the options")
    script = find_script(script_words)
    if own.num_processes is not None or own.strategy is not None:
        return _launch(own, own_words, script_words)
    if own.dry_run:
        raise ConfigError("--dry_run", "prints the launcher's command; give --num_processes or --strategy too")
    # The script reads its arguments here, and runs are named after the script.
    sys.argv = [script.path, *script.words]
    _enable_autologging(own)
    return run_script(script, silent=own.silent)


# ------------------------------------------------------------------------------ options


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the options of this command from the script and its arguments."""
    position = 0
    while position < len(words) and words[position].startswith("-") and words[position] != MODULE:
        position += 1 if words[position] in _FLAGS or "=" in words[position] else 2
    return list(words[:position]), list(words[position:])


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="harness run",
        usage="harness run [OPTIONS] {SCRIPT | -m MODULE} [ARGS]",
        allow_abbrev=False,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    logging = parser.add_argument_group("parameters of harness.autolog")
    logging.add_argument("--every_n_epochs", type=_count_or_null, default=5, metavar="N", help="5; null: only the end")
    logging.add_argument("--log_models", type=_bool, default=True, metavar="BOOL")
    logging.add_argument("--log_datasets", type=_bool, default=True, metavar="BOOL")
    logging.add_argument("--log_every_n_steps", type=_count_or_null, default=None, metavar="N")
    logging.add_argument("--monitor", default=None, metavar="METRIC")
    logging.add_argument("--mode", choices=("min", "max"), default="min")
    logging.add_argument("--save_top_k", type=_whole, default=-1, metavar="K")
    logging.add_argument("--registered_model_name", default=None, metavar="NAME")
    logging.add_argument("--extra_tags", type=_tag, nargs=1, action="extend", default=[], metavar="NAME=TEXT")
    logging.add_argument("--silent", type=_bool, default=False, metavar="BOOL")
    logging.add_argument("--exclusive", type=_bool, default=False, metavar="BOOL")
    logging.add_argument(
        "--when_busy", choices=("wait", "skip"), default="wait", help="wait; skip: skip a save while one is running"
    )
    where = parser.add_argument_group("the run")
    where.add_argument("--resume", default="never", metavar="auto|never|PATH", help="as in harness.resume (never)")
    where.add_argument(
        "--reset_scheduler", action="store_true", help="when resuming, use the script's scheduler, not the checkpoint's"
    )
    where.add_argument("--run_name", default=None, metavar="NAME")
    where.add_argument("--run_dir", default="runs", metavar="DIR")
    where.add_argument("--experiment_name", default=None, metavar="NAME")
    launcher = parser.add_argument_group("several processes on this machine")
    launcher.add_argument("--strategy", choices=STRATEGIES, default=None)
    launcher.add_argument("--num_processes", type=_at_least_one, default=None, metavar="N")
    launcher.add_argument("--main_process_port", type=_whole, default=0, metavar="PORT")
    launcher.add_argument("--max_restarts", type=_whole, default=0, metavar="N")
    launcher.add_argument("--dry_run", action="store_true", help="only print the command")
    own, unknown = parser.parse_known_args(list(words))
    if unknown:
        names = ", ".join(name for action in parser._actions for name in action.option_strings[-1:])
        raise ConfigError(
            unknown[0], f"is not an option of harness run ({names}); give the script's options after the script"
        )
    return own


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() == "true"


def _count_or_null(text: str) -> int | None:
    return None if text.lower() in ("null", "none") else _whole(text, "a whole number or null")


def _whole(text: str, what: str = "a whole number") -> int:
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
    return int(text)


def _at_least_one(text: str) -> int:
    if (number := _whole(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _tag(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=TEXT, got {text!r}")
    return name, value


def _check_resume(own: argparse.Namespace) -> None:
    """Check `--resume` before the script runs, and print the latest unnamed run if `auto` would start a new one.

    Raises:
        ConfigError: if the path does not exist.
    """
    if own.resume not in ("auto", "never") and ":/" not in own.resume and not Path(own.resume).exists():
        raise ConfigError(
            "--resume",
            f"there is no {own.resume}; give auto, never, a run's directory (such as {own.run_dir}/<run_name>), a "
            "checkpoint's, or an address in MLflow (models:/..., runs:/...)",
        )
    if own.resume == "auto" and own.run_name is None and not own.silent and is_launcher_rank_zero():
        name = script_name()
        made = Path(own.run_dir).glob(f"{name}-*/run.json")
        unnamed = sorted(
            (path for path in made if first_run_of(path.parent) == path.parent), key=lambda path: path.stat().st_mtime
        )
        if unnamed and not (Path(own.run_dir) / name / "run.json").exists():
            latest = unnamed[-1].parent
            write_error(f"harness: starting run {name}; to resume the latest one, give --resume {latest}\n")


def _enable_autologging(own: argparse.Namespace) -> None:
    _check_resume(own)
    if own.resume != "never" or own.run_name or own.run_dir != "runs" or own.experiment_name:
        resume(
            own.resume,
            run_name=own.run_name,
            run_dir=own.run_dir,
            experiment_name=own.experiment_name,
            reset_scheduler=own.reset_scheduler,
        )
    autolog(
        every_n_epochs=own.every_n_epochs,
        log_models=own.log_models,
        log_datasets=own.log_datasets,
        log_every_n_steps=own.log_every_n_steps,
        monitor=own.monitor,
        mode=own.mode,
        save_top_k=own.save_top_k,
        registered_model_name=own.registered_model_name,
        extra_tags=dict(own.extra_tags),
        silent=own.silent,
        exclusive=own.exclusive,
        when_busy=own.when_busy,
    )


# ------------------------------------------------------------------------------ several processes


def _launch(own: argparse.Namespace, own_words: Sequence[str], script_words: Sequence[str]) -> int:
    kept = _without_launcher(own_words)
    strategy = own.strategy or "ddp"
    count = own.num_processes or (1 if strategy == "single" else 2)
    plan = LaunchPlan(strategy, count, own.main_process_port, (*kept, *script_words), own.max_restarts, command="run")
    return start_ranks(plan, None, dry_run=own.dry_run)


def _without_launcher(words: Sequence[str]) -> list[str]:
    names = ("--strategy", "--num_processes", "--main_process_port", "--max_restarts")
    kept: list[str] = []
    position = 0
    while position < len(words):
        name, equals, _ = words[position].partition("=")
        if name in names:
            position += 1 if equals else 2
            continue
        kept.append(words[position])
        position += 1
    return kept


def main(words: Sequence[str]) -> NoReturn:
    """Run the subcommand and end the process with its exit code."""
    from harness.__main__ import exit_process, report_error

    try:
        code: Any = run(words)
    except HarnessError as error:
        code = report_error(error)
    except SystemExit as exit:
        if not isinstance(exit.code, (int, type(None))):
            raise
        code = exit.code or EXIT_DONE
    exit_process(code)
