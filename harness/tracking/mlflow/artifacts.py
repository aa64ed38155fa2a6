"""Download artifacts from MLflow, in this process or in a child process.

    python -m harness.tracking.mlflow.artifacts DIRECTORY

The trainer never imports mlflow, so it starts the child process, which reads the address from standard input and prints
the path as the last line of standard output.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.io.redact import root_cause


def download(where: str, target: str | None = None) -> Path:
    """Download artifacts by their MLflow address (``runs:/...``, ``models:/...``) and return their path.

    Effects: not collective; any thread; blocks on the network; leaves the files in `target`, or in a new directory.
    """
    import mlflow

    return Path(mlflow.artifacts.download_artifacts(artifact_uri=where, dst_path=target))


def main(argv: list[str]) -> int:
    """Run the process; returns 0 if all files are downloaded."""
    # With MLflow's defaults a request to an unreachable server blocks for 246 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
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
