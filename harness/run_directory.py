"""The directory of a run: made on rank zero, refused where it cannot be used."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict
from pathlib import Path

import yaml

from harness.checkpoint.commit import remove_leftovers
from harness.config import RunConfig, check_run_name
from harness.durable import replace_file
from harness.errors import RunDirError
from harness.redact import without_password

# Room for the outbox and the configuration; checkpoints are another matter, and say so themselves.
_NEEDED_BYTES = 256 * 1024


def make_run_directory(
    runs_dir: Path, run_name: str | None, stem: str | None, resume: bool = False
) -> tuple[str, Path]:
    """Make ``<runs_dir>/<run_name>/`` with ``run.json`` in it; returns name and path.

    Effects: not collective, rank zero only; any thread; blocks on fsync; leaves the directory.

    Args:
        runs_dir: where runs are.
        run_name: its name, or None to make one up from `stem` and the time.
        stem: what a made-up name begins with.
        resume: go on where there is a run of that name.

    Raises:
        RunDirError: if it cannot be made or written, or holds a run already.
        ConfigError: if the name cannot be a directory's.
    """
    check_run_name(run_name)
    made_up = run_name is None
    name = run_name or f"{_word(stem)}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = runs_dir / name
    try:
        if made_up and path.exists():
            name = f"{name}-{uuid.uuid4().hex[:4]}"
            path = runs_dir / name
        if (path / "run.json").exists() and resume:
            remove_leftovers(path / "checkpoints")
            return name, path
        if (path / "run.json").exists():
            raise RunDirError(
                f"run_name: {path} holds a run already, and continuing one is not there yet; "
                "give another run_name, or remove that directory"
            )
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_leftovers(path / "checkpoints")
        _require_space(path)
        record = {"run_name": name, "run_key": f"{name}-{uuid.uuid4().hex}", "created_ms": time.time_ns() // 1_000_000}
        replace_file(path / "run.json", json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise RunDirError(
            f"run_dir: cannot write into {path.absolute()}: {error.strerror}; "
            "free space, change its permissions, or give another --run_dir"
        ) from error
    return name, path


def _require_space(path: Path) -> None:
    """Write a little and take it away again: on a full disk the run would end at its first metric."""
    probe = path / ".space"
    try:
        with probe.open("wb") as stream:
            stream.write(bytes(_NEEDED_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _word(stem: str | None) -> str:
    kept = "".join(c if c.isalnum() or c in "._-" else "-" for c in stem or "run").strip(".-")
    return kept or "run"


def write_config(path: Path, config: RunConfig) -> None:
    """Write the resolved configuration as ``config.yaml``, without a password in the tracking URI.

    Effects: not collective, rank zero only; any thread; blocks on fsync; leaves ``config.yaml``.

    Raises:
        RunDirError: if the disk refuses it.
    """
    values = asdict(config)
    uri = config.tracking.tracking_uri
    values["tracking"]["tracking_uri"] = None if uri is None else without_password(uri)
    try:
        replace_file(path / "config.yaml", yaml.safe_dump(values, sort_keys=False))
    except OSError as error:
        raise RunDirError(
            f"run_dir: cannot write {path / 'config.yaml'}: {error.strerror}; free space there"
        ) from error
