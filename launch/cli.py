"""Run the `harness` command. `harness --help` imports neither torch nor jsonargparse."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from harness import __version__
from harness.config.schema import SAVE_DTYPES, parse_size_bytes
from harness.errors import EXIT_DONE, EXIT_FAILED, ConfigError, HarnessError, RunDirError
from harness.io.child_process import standard_library
from harness.io.standard_streams import occupy_descriptors, write_error, write_output
from launch.command_parser import CommandParser

_DESCRIPTION = """\
Train with Accelerate, save sharded checkpoints as safetensors, track runs in MLflow.

  harness train  --config configs/digits.yaml [--trainer.max_epochs 3 ...]
  harness launch --strategy fsdp2 --num_processes 4 --config configs/byte_lm.yaml
  harness submit --config configs/byte_lm.yaml --strategy fsdp2 --nodes 2 --gpus_per_node 8 --time 04:00:00
  harness run    train.py [ARGS]
  harness stop   runs/RUN
  harness debug  --config configs/digits.yaml
  harness checkpoints runs/RUN [--json]
  harness sync   runs/RUN, or --all [--watch]
  harness verify  runs/RUN/checkpoints/epoch-0005
  harness inspect runs/RUN/checkpoints/epoch-0005 [--json]
  harness export  runs/RUN/checkpoints/epoch-0005 --output DIR [--dtype bfloat16] [--max_shard_size 5GB]
"""
# Subcommands that parse their own options; `harness train --help` lists those of the configuration.
_WITH_OWN_PARSER = {
    "train": "train in this process, or as one rank of a launcher",
    "launch": "start several processes: print the accelerate command and execute it",
    "submit": "submit a training to SLURM, with slurm/train.sbatch",
    "rank": "one rank of a SLURM step; slurm/train.sbatch starts it with srun",
    "run": "run an unchanged Accelerate script, with logging and checkpoints",
    "debug": "train a few batches in one process, without MLflow, with anomaly detection; breakpoints work",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: 0 done, 2 usage error, 75 requeue, 1 any other failure."""
    words = list(sys.argv[1:] if argv is None else argv)
    occupy_descriptors()
    if argv is None and not sys.flags.safe_path and sys.path[0] not in standard_library():
        del sys.path[0]  # the directory of this command's file, from which nothing may be imported
    try:
        if words and words[0] in _WITH_OWN_PARSER:
            return _run_with_own_parser(words[0], words[1:])
        arguments = _make_parser().parse_args(words)
        return _COMMANDS[arguments.command](arguments)
    except HarnessError as error:
        print(f"harness: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_FAILED
    except BrokenPipeError:
        # The reader, such as `head`, has ended. Redirect the text that is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def _make_parser() -> CommandParser:
    parser = CommandParser(
        prog="harness", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in _WITH_OWN_PARSER.items():
        commands.add_parser(name, help=text, add_help=False)
    listing = commands.add_parser("checkpoints", help="list a run's checkpoints, on disk and in MLflow")
    listing.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    listing.add_argument("--json", action="store_true", help="print JSON")
    stop = commands.add_parser("stop", help="request a running job to save a checkpoint and stop")
    stop.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    stop.add_argument("--reason", default="requested", help="printed in the job's log")
    restarts = commands.add_parser(
        "restarts", help="count a start of a job; exit code 2 if starts make no progress (slurm/*.sbatch)"
    )
    restarts.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    restarts.add_argument("--max_idle", type=int, default=3, metavar="N", help="starts in a row at one step (3)")
    sync = commands.add_parser("sync", help="deliver to MLflow what it does not have yet")
    sync.add_argument("run_dir", type=Path, nargs="*", metavar="RUN_DIR", help="with --all: directories of runs (runs)")
    sync.add_argument("--all", action="store_true", help="all runs in a directory of runs")
    sync.add_argument("--watch", action="store_true", help="keep delivering until interrupted")
    sync.add_argument("--if_online", action="store_true", help="skip runs that are offline or were never started")
    sync.add_argument("--every_s", type=float, default=15.0, metavar="S", help="interval of --watch (%(default)s)")
    sync.add_argument("--tracking_uri", default=None, help="MLflow's address; default: that of the run")
    verify = commands.add_parser("verify", help="verify every byte of a checkpoint against its digests")
    verify.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    inspect = commands.add_parser("inspect", help="list a checkpoint's tensors: name, type, shape, bytes, writer")
    inspect.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    export = commands.add_parser("export", help="write a checkpoint's verified weights to a directory")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    export.add_argument("--output", type=Path, required=True, metavar="DIR", help="is created")
    export.add_argument("--dtype", choices=SAVE_DTYPES, default=None, help="cast floating-point tensors to this type")
    export.add_argument("--max_shard_size", default=None, metavar="SIZE", help="largest size of a file, such as 5GB")
    return parser


def _run_with_own_parser(command: str, words: Sequence[str]) -> int:
    # Imports are late, so that errors and help of other subcommands are fast.
    if command == "run":
        from launch.run import main as run_script

        run_script(words)  # sets sys.path for its script
    _add_working_directory()
    if command == "train":
        from harness.__main__ import exit_process
        from harness.__main__ import main as train

        exit_process(train(words, prog="harness train"))
    if command == "launch":
        from launch.local import launch

        return launch(words)
    if command == "submit":
        from launch.submit import submit

        return submit(words)
    if command == "rank":
        from launch.rank import rank

        return rank(words)
    from launch.debug import debug

    return debug(words)


def _add_working_directory() -> None:
    """Make the user's classes importable, after the standard library, so that they cannot shadow its modules."""
    standard = standard_library()
    behind = max((number for number, path in enumerate(sys.path) if path in standard), default=-1) + 1
    sys.path.insert(behind, os.getcwd())


def _checkpoints(arguments: argparse.Namespace) -> int:
    from harness.checkpoint.format.commit import scan_checkpoints
    from harness.diagnostics.report import checkpoint_records, checkpoint_table

    run_dir: Path = arguments.run_dir
    _require_run(run_dir)
    print(json.dumps(checkpoint_records(run_dir), indent=2) if arguments.json else checkpoint_table(run_dir))
    return EXIT_FAILED if scan_checkpoints(run_dir / "checkpoints")[1] else EXIT_DONE


def _sync(arguments: argparse.Namespace) -> int:
    from harness.config.parsing import refuse_typed_password
    from harness.tracking.publisher.sync import deliver_all, deliver_rest, is_online, runs_in

    refuse_typed_password("--tracking_uri", arguments.tracking_uri, [arguments.tracking_uri or ""])
    directories: list[Path] = arguments.run_dir or ([Path("runs")] if arguments.all else [])
    if not directories:
        raise ConfigError("", "harness sync: needs the directory of a run, or --all")
    if arguments.if_online and not arguments.all:
        directories = [run_dir for run_dir in directories if is_online(run_dir)]
    if not arguments.all:
        for run_dir in directories:
            _require_run(run_dir)
        if not arguments.watch:
            for run_dir in directories:
                write_output(f"{deliver_rest(run_dir, arguments.tracking_uri)}\n")
            return EXIT_DONE

    def deliver() -> bool:
        # Listed again each time, because new jobs create runs.
        run_dirs = [run for each in directories for run in runs_in(each)] if arguments.all else directories
        is_whole = True
        for _, error in deliver_all(run_dirs, arguments.tracking_uri, lambda line: write_output(f"{line}\n")):
            is_whole = False
            write_error(f"harness: error: {error}\n")
        return is_whole

    if not arguments.watch:
        return EXIT_DONE if deliver() else EXIT_FAILED
    # A shell ignores SIGINT in processes that it starts in the background.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        while True:
            deliver()
            time.sleep(arguments.every_s)
    return EXIT_DONE


def _verify(arguments: argparse.Namespace) -> int:
    from harness.checkpoint.format.verify import require_checkpoint, summary, verify

    require_checkpoint(arguments.checkpoint)
    found = verify(arguments.checkpoint)
    print(summary(arguments.checkpoint, found))
    return EXIT_FAILED if found.problems else EXIT_DONE


def _inspect(arguments: argparse.Namespace) -> int:
    from harness.checkpoint.format.verify import require_checkpoint
    from harness.checkpoint.tools import inspect

    require_checkpoint(arguments.checkpoint)
    print(
        json.dumps(inspect.contents(arguments.checkpoint), indent=1)
        if arguments.json
        else inspect.text(arguments.checkpoint)
    )
    return EXIT_DONE


def _export(arguments: argparse.Namespace) -> int:
    size = arguments.max_shard_size
    size_bytes = None if size is None else parse_size_bytes("--max_shard_size", size)
    from harness.checkpoint.format.verify import require_checkpoint
    from harness.checkpoint.tools.export import export

    require_checkpoint(arguments.checkpoint)
    written = export(arguments.checkpoint, arguments.output, dtype=arguments.dtype, max_shard_size_bytes=size_bytes)
    print(f"{written:,} bytes in {arguments.output}")
    return EXIT_DONE


def _stop(arguments: argparse.Namespace) -> int:
    from harness.run.stop_request import ask_to_stop

    ask_to_stop(arguments.run_dir, arguments.reason)
    print(f"{arguments.run_dir}: asked to stop")
    return EXIT_DONE


def _restarts(arguments: argparse.Namespace) -> int:
    from harness.run.requeue_limit import count_start

    count_start(arguments.run_dir, arguments.max_idle)
    return EXIT_DONE


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "checkpoints": _checkpoints,
    "stop": _stop,
    "restarts": _restarts,
    "sync": _sync,
    "verify": _verify,
    "inspect": _inspect,
    "export": _export,
}


def _require_run(run_dir: Path) -> None:
    if not (run_dir / "run.json").exists():
        raise RunDirError(f"{run_dir}: is not the directory of a run (it has no run.json); give runs/<run_name>")


if __name__ == "__main__":
    sys.exit(main())
