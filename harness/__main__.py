"""``accelerate launch -m harness --config configs/digits.yaml``: what each rank runs."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from harness.config.parsing import parse_run_config
from harness.config.schema import RunConfig
from harness.errors import EXIT_DONE, EXIT_FAILED, HarnessError, PeerFailure, Stopped, reason_of
from harness.io.redact import redact_message
from harness.io.standard_streams import flush, occupy_descriptors, write_error

_RANK_ZERO_FIRST_S = 3.0


def main(argv: Sequence[str], *, prog: str = "python -m harness") -> int:
    """Train; returns the exit code. Errors are told in one line, by one rank.

    Raises:
        SystemExit: after ``--help`` and ``--print_config``.
    """
    try:
        config = parse_run_config(argv, prog=prog)
        return run(config)
    except (HarnessError, KeyboardInterrupt) as error:
        return tell(error)
    except Exception as error:
        # An error of the task's: the traceback is from the rank that has it.
        write_error(redact_message(traceback.format_exc()))
        return tell(error)


def run(config: RunConfig) -> int:
    """Train with a configuration that is parsed already, and say what came out."""
    # Imported late: parsing, and its errors, take no torch.
    from harness.training.app import train

    logger = train(config)
    logger.progress.stop()
    if logger.topology.rank == 0 and logger.run_path is not None:
        from harness.diagnostics.report import checkpoint_table, how_to_open

        logger.progress.say(checkpoint_table(logger.run_path))
        logger.progress.say(how_to_open(logger.run_path))
    return EXIT_DONE


def tell(error: BaseException) -> int:
    """One line on standard error, from one rank; returns the exit code.

    Rank zero speaks for all: it knows the other ranks' reasons. Another rank does only where nobody
    could say whose fault it was, since that may be rank zero's.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    nobody_knows = isinstance(error, PeerFailure) and error.rank is None
    if rank > 0 and not isinstance(error, PeerFailure) and not getattr(error, "is_told_to_peers", False):
        # From before the ranks could tell each other. Where rank zero has the same error, it says so and
        # ends, and the launcher ends this rank within the pause.
        time.sleep(_RANK_ZERO_FIRST_S)
        nobody_knows = True
    if rank == 0 or nobody_knows:
        where = f" (seen by rank {rank} of {world_size})" if world_size > 1 else ""
        what = "" if isinstance(error, Stopped) else f"error{where}: "
        write_error(f"harness: {what}{redact_message(reason_of(error))}\n")
        flush()
    return error.exit_code if isinstance(error, HarnessError) else EXIT_FAILED


def leave(code: int) -> NoReturn:
    """End the process; after a failure without the interpreter's own end.

    That end would run destructors of process groups whose other side is gone, and can wait for them.
    """
    flush()
    if code != EXIT_DONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    occupy_descriptors()
    leave(main(sys.argv[1:]))
