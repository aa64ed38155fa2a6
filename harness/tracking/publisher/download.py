"""``python -m harness.tracking.publisher.download DIRECTORY``: artifacts of MLflow into a directory.

A process of its own, since the trainer never imports mlflow. The address comes by standard input; the last line on
standard output is the path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.tracking.publisher.process import root_cause


def main(argv: list[str]) -> int:
    """Entry point of the process; 0 if all is there."""
    # As the publisher has it: with MLflow's own defaults a call to a dead server blocks for 246 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from harness.tracking.mlflow.artifacts import download

    where, directory = sys.stdin.read(), Path(argv[0])
    directory.mkdir(parents=True, exist_ok=True)
    try:
        path = download(where, str(directory))
    except Exception as error:
        sys.stderr.write(root_cause(error) + "\n")
        return 1
    sys.stdout.write(f"{path.absolute()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
