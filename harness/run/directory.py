"""Create, open and lock a run's directory on rank zero."""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.checkpoint.format.commit import remove_leftovers
from harness.config.schema import RunConfig, check_run_name
from harness.distributed.launch_identity import launch_identity, restarted_identity
from harness.errors import RunDirError
from harness.io.durable_files import replace_file
from harness.io.redact import redact_tree, without_password
from harness.run.lock import TIMEOUT_S, RunLock

FILE = "run.json"

# Torch's agent restarts after any exit code but 0; a batch system restarts a stopped job only on request.
_RESTARTS_AFTER_ANY_END = "torchelastic"
# Space for the outbox and the configuration; a save checks the space for its checkpoint itself.
_NEEDED_BYTES = 256 * 1024


@dataclass(frozen=True)
class RunDirectory:
    """Describe a run's directory, ``<runs_dir>/<name>``, and the attempt that opened it.

    Args:
        attempt: number of the job that works on the run, from 1.
        stopped_by: what stopped this launch cleanly before its launcher restarted it; None otherwise.
    """

    name: str
    path: Path
    attempt: int
    stopped_by: str | None = None

    @property
    def continues(self) -> bool:
        """Whether the run existed before this attempt."""
        return self.attempt > 1


def make_run_directory(
    runs_dir: Path,
    run_name: str | None,
    stem: str | None,
    resume: str,
    lock_timeout_s: float = TIMEOUT_S,
) -> tuple[RunDirectory, RunLock]:
    """Create ``<runs_dir>/<run_name>/`` and its ``run.json``, or open the existing run of that name.

    Without a name each call creates a run, named by `stem` and the time. A process that its launcher has restarted
    opens the newest run of the same launch.

    Effects: not collective, rank zero only; any thread; blocks on fsync and on a job that is just ending; leaves the
    directory, locked until the lock is released or this process dies.

    Args:
        runs_dir: parent directory of the runs.
        run_name: name of the run, or None.
        stem: first part of a generated name.
        resume: ``never`` refuses an existing run; any other value opens it.
        lock_timeout_s: longest wait for another job to end, in seconds.

    Raises:
        RunDirError: if the directory cannot be created or written, another job uses it, or `resume` is ``never`` and it
            holds a run.
        ConfigError: if the name cannot be a directory's.
    """
    check_run_name(run_name)
    path = runs_dir
    try:
        name = run_name or (None if resume == "never" else _name_before_restart(runs_dir)) or _made_up(runs_dir, stem)
        path = runs_dir / name
        _refuse_if_never(path, resume)
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = RunLock(path, lock_timeout_s)
        try:
            # Check again under the lock: another job may have created the run since the first check.
            _refuse_if_never(path, resume)
            attempt, stopped_by = _write_record(path, name, is_made_up=run_name is None)
            # Only under the lock: without it, these could be the files of another job's save in progress.
            remove_leftovers(path / "checkpoints")
        except BaseException:
            lock.release()
            raise
    except OSError as error:
        raise RunDirError(
            f"run_dir: cannot write into {path.absolute()}: {error.strerror}; "
            "free space, change its permissions, or give another --run_dir"
        ) from error
    return RunDirectory(name, path, attempt, stopped_by), lock


def note_stop(path: Path, stopped_by: str) -> None:
    """Record in ``run.json`` that this launch stopped cleanly, as its launcher may still restart it.

    Effects: not collective, rank zero only, under the lock; any thread; blocks on fsync; changes ``run.json``.

    Raises:
        RunDirError: if ``run.json`` cannot be read.
        OSError: if it cannot be written.
    """
    identity = launch_identity().get(_RESTARTS_AFTER_ANY_END)
    if identity is not None:
        record = read_run_record(path) | {"stopped": {"launch": identity, "by": stopped_by}}
        replace_file(path / FILE, json.dumps(record, indent=2) + "\n", is_private=True)


def _write_record(path: Path, name: str, *, is_made_up: bool) -> tuple[int, str | None]:
    """Write this attempt into ``run.json``; return its number and what stopped this launch before."""
    _require_space(path)
    record = read_run_record(path) if (path / FILE).exists() else None
    if record is None:
        key = f"{name}-{uuid.uuid4().hex}"
        record = {"run_name": name, "run_key": key, "created_ms": time.time_ns() // 1_000_000, "attempt": 1}
    else:
        record["attempt"] = record.get("attempt", 1) + 1
    if is_made_up:
        record["launch"] = launch_identity()
    stopped = record.get("stopped", {})
    if restarted_identity() != (_RESTARTS_AFTER_ANY_END, stopped.get("launch")):
        # A new launch, not a restart by the same launcher: the run is to continue.
        record.pop("stopped", None)
        stopped = {}
    replace_file(path / FILE, json.dumps(record, indent=2) + "\n", is_private=True)
    attempt: int = record["attempt"]
    return attempt, stopped.get("by")


def _refuse_if_never(path: Path, resume: str) -> None:
    if resume == "never" and (path / FILE).exists():
        raise RunDirError(
            f"run_name: {path} holds a run already, and resume_from_checkpoint (--resume of harness run) is never; "
            "use auto to go on with it, give another run_name, or remove that directory"
        )


def _name_before_restart(runs_dir: Path) -> str | None:
    """Return the newest run that this launch created before its launcher restarted it."""
    restarted = restarted_identity()
    if restarted is None:
        return None
    launcher, identity = restarted
    found = []
    for file in runs_dir.glob(f"*/{FILE}"):
        try:
            record = read_run_record(file.parent)
        except RunDirError:  # another run's unreadable record does not matter here
            continue
        if record.get("launch", {}).get(launcher) == identity:
            found.append((record.get("created_ms", 0), file.parent.name))
    return max(found)[1] if found else None


def _made_up(runs_dir: Path, stem: str | None) -> str:
    """Generate a name and create its directory at once, as the tasks of a job array start in the same second."""
    name = f"{_word(stem)}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        (runs_dir / name).mkdir(parents=True)
    except FileExistsError:
        name = f"{name}-{uuid.uuid4().hex[:8]}"
        (runs_dir / name).mkdir(parents=True)
    return name


def read_run_record(run_dir: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        RunDirError: if it cannot be read or is not the record of a run.
    """
    path = run_dir / FILE
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: cannot be read: {error}; give another run_name, or put it right") from error
    if not isinstance(record, dict) or not {"run_name", "run_key"} <= record.keys():
        raise RunDirError(f"{path}: is not the record of a run; give another run_name, or put it right")
    return record


def _require_space(path: Path) -> None:
    """Write and remove a small file, so that a full disk fails here and not at the first metric."""
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
    """Write the resolved configuration as ``config.yaml``, with secrets redacted.

    Effects: not collective, rank zero only; any thread; blocks on fsync; leaves ``config.yaml``.

    Raises:
        RunDirError: if the file cannot be written.
    """
    values = redact_tree(asdict(config))
    uri = config.tracking.tracking_uri
    values["tracking"]["tracking_uri"] = None if uri is None else without_password(uri)
    try:
        replace_file(path / "config.yaml", yaml.safe_dump(values, sort_keys=False), is_private=True)
    except OSError as error:
        raise RunDirError(
            f"run_dir: cannot write {path / 'config.yaml'}: {error.strerror}; free space there"
        ) from error
