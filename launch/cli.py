"""The `harness` command. `harness --help` imports neither torch nor jsonargparse."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import __version__
from harness.errors import EXIT_DONE, HarnessError, RunDirError
from launch.command_parser import CommandParser

_DESCRIPTION = """\
Train with Accelerate, save sharded checkpoints as safetensors, track in MLflow.

  harness train  --config configs/digits.yaml [--trainer.max_epochs 3 ...]
  harness launch --strategy fsdp2 --num_processes 4 --config configs/byte_lm.yaml
  harness debug  --config configs/digits.yaml
  harness checkpoints runs/RUN [--json]
  harness sync   runs/RUN
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 2 usage, 75 to be requeued, 1 anything else)."""
    words = list(sys.argv[1:] if argv is None else argv)
    return _told(lambda: _run(words))


def _run(words: list[str]) -> int:
    parser = CommandParser(
        prog="harness", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"harness {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # These three take the options of the whole configuration: `harness train --help` lists them.
    for name, what in (
        ("train", "train in this process, or as one rank of a launcher's"),
        ("launch", "start several processes: prints the accelerate command, then becomes it"),
        ("debug", "one process, a few batches, no MLflow run: anomaly detection, breakpoints work"),
    ):
        commands.add_parser(name, help=what, add_help=False)
    listing = commands.add_parser("checkpoints", help="table of a run's checkpoints: on disk, in MLflow")
    listing.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    listing.add_argument("--json", action="store_true", help="as JSON")
    sync = commands.add_parser("sync", help="deliver what MLflow has not had")
    sync.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    sync.add_argument("--tracking_uri", default=None, help="where to; default: where the run was to go")
    if words and words[0] in _OWN_PARSERS:
        # As `python -m` has it: the user's own classes are found where the command is typed.
        sys.path.insert(0, os.getcwd())
        return _OWN_PARSERS[words[0]](words[1:])
    arguments = parser.parse_args(words)
    if arguments.command == "checkpoints":
        return _checkpoints(arguments.run_dir, as_json=arguments.json)
    return _sync(arguments.run_dir, arguments.tracking_uri)


def _told(command: Callable[[], int]) -> int:
    """Run a command; its errors are one line."""
    try:
        return command()
    except HarnessError as error:
        print(f"harness: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 1


def _train(words: Sequence[str]) -> int:
    from harness.__main__ import leave
    from harness.__main__ import main as train

    leave(train(words, prog="harness train"))


def _launch(words: Sequence[str]) -> int:
    from launch.local import launch

    return launch(words)


def _debug(words: Sequence[str]) -> int:
    from launch.debug import debug

    return debug(words)


_OWN_PARSERS: dict[str, Callable[[Sequence[str]], int]] = {"train": _train, "launch": _launch, "debug": _debug}


def _checkpoints(run_dir: Path, *, as_json: bool) -> int:
    from harness.report import checkpoint_records, checkpoint_table

    _require_run(run_dir)
    print(json.dumps(checkpoint_records(run_dir), indent=2) if as_json else checkpoint_table(run_dir))
    return EXIT_DONE


def _sync(run_dir: Path, tracking_uri: str | None) -> int:
    from harness.tracking.tracker import deliver_rest

    _require_run(run_dir)
    print(deliver_rest(run_dir, tracking_uri))
    return EXIT_DONE


def _require_run(run_dir: Path) -> None:
    if not (run_dir / "run.json").exists():
        raise RunDirError(f"{run_dir}: is not the directory of a run (it has no run.json); give runs/<run_name>")


if __name__ == "__main__":
    sys.exit(main())
