"""``accelerate launch -m harness --config configs/digits.yaml``: the program of each rank."""

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
    """Train and return the exit code. One rank prints an error, in one line.

    Raises:
        SystemExit: after ``--help`` and ``--print_config``.
    """
    try:
        config = parse_run_config(argv, prog=prog)
        return run(config)
    except (HarnessError, KeyboardInterrupt) as error:
        return report_error(error)
    except Exception as error:
        # An error of the task: the rank that raised it prints the traceback.
        write_error(redact_message(traceback.format_exc()))
        return report_error(error)


def run(config: RunConfig) -> int:
    """Train with a parsed configuration, and print the checkpoints."""
    # Imported late: parsing and its errors need no torch.
    from harness.training.app import train

    logger = train(config)
    logger.progress.stop()
    if logger.topology.rank == 0 and logger.run_path is not None:
        from harness.diagnostics.report import checkpoint_table, how_to_open

        logger.progress.say(checkpoint_table(logger.run_path))
        logger.progress.say(how_to_open(logger.run_path))
    return EXIT_DONE


def report_error(error: BaseException) -> int:
    """Print one line on standard error, from one rank; returns the exit code.

    Rank 0 prints it, because it knows the other ranks' reasons. Another rank prints it only if the failed rank could
    not be identified, since that may be rank 0.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    is_unattributed = isinstance(error, PeerFailure) and error.rank is None
    if rank > 0 and not isinstance(error, PeerFailure) and not getattr(error, "is_reported_to_ranks", False):
        # Raised before the ranks could report to one another. If rank 0 has the same error, it prints it and ends,
        # and the launcher ends this rank within the pause.
        time.sleep(_RANK_ZERO_FIRST_S)
        is_unattributed = True
    if rank == 0 or is_unattributed:
        where = f" (seen by rank {rank} of {world_size})" if world_size > 1 else ""
        kind = "" if isinstance(error, Stopped) else f"error{where}: "
        write_error(f"harness: {kind}{redact_message(reason_of(error))}\n")
        flush()
    return error.exit_code if isinstance(error, HarnessError) else EXIT_FAILED


def exit_process(code: int) -> NoReturn:
    """End the process; after a failure with several ranks, without the interpreter's shutdown.

    That shutdown destroys process groups whose peers are gone, and may wait for them.
    """
    flush()
    if code != EXIT_DONE and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    occupy_descriptors()
    exit_process(main(sys.argv[1:]))
