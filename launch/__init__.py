"""Implement the `harness` command. This package imports `harness`, never the reverse.

In reading order:

    cli             parse the command line and run one subcommand
    command_parser  argparse with one-line errors
    local           `harness launch`: start several processes on this machine
    run             `harness run`: run an unchanged training script
    script          find that script and execute it as `__main__`
    debug           `harness debug`: train a few batches in one process
    submit          `harness submit`: check and submit a SLURM job
    job_script      render the batch script of a SLURM job
    rank            `harness rank`: run one rank of a SLURM step
"""

import sys
from importlib import import_module
from pathlib import Path

# Import the `harness` installed with this package, even if PYTHONPATH has another one first.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import_module("harness")
del sys.path[0]
