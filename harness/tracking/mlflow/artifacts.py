"""From an address in MLflow to files here, in whatever process asks."""

from __future__ import annotations

from pathlib import Path

import mlflow


def download(where: str, target: str | None = None) -> Path:
    """Fetch artifacts, by MLflow's own address of them (``runs:/...``, ``models:/...``); where they are.

    Effects: not collective; any thread; blocks on the network; leaves the files in `target`, or where it is None in
    a directory that MLflow makes.
    """
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=where, dst_path=target))
