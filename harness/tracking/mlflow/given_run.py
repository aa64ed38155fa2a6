"""Find the MLflow run that the user chose in the environment or as MLflow's active run. Never imports mlflow.

    run           the one in ``run.json``, MLFLOW_RUN_ID, the active run, a new run
    experiment    of a new run: the argument, MLFLOW_EXPERIMENT_ID, MLFLOW_EXPERIMENT_NAME, ``default``

The first one that exists is used. `mlflow.set_experiment` sets MLFLOW_EXPERIMENT_ID; `mlflow.start_run` removes
MLFLOW_RUN_ID.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_ID = "MLFLOW_RUN_ID"
EXPERIMENT_ID = "MLFLOW_EXPERIMENT_ID"

# Only these characters are escaped, so that addresses written by earlier versions remain equal.
_ESCAPES = str.maketrans({character: f"%{ord(character):02X}" for character in "%?"})

# As with `mlflow.start_run`, MLFLOW_RUN_ID applies only to the first training of a process.
_used: set[str] = set()


@dataclass(frozen=True)
class GivenRun:
    """An existing MLflow run for a new training, where the user chose it (`source`), and messages (`notes`)."""

    run_id: str
    source: str
    notes: tuple[str, ...] = ()


def given_run(tracking_uri: str | None) -> GivenRun | None:
    """Return the run that the user chose, or None. `mark_used` excludes the run of MLFLOW_RUN_ID.

    Effects: not collective; rank 0 only; main thread, because MLflow's active run belongs to a thread.
    """
    active = active_run_id()
    named = os.environ.get(RUN_ID)
    if named and named not in _used:
        notes = (f"{RUN_ID} names MLflow run {named}: the active run {active} is not used",)
        return GivenRun(named, RUN_ID, notes if active not in (None, named) else ())
    if active is None or _is_elsewhere(tracking_uri):
        return None
    return GivenRun(active, "the active run")


def mark_used(run_id: str | None) -> None:
    """Record that a training uses this run, so that the process's next training ignores MLFLOW_RUN_ID."""
    if run_id is not None and run_id == os.environ.get(RUN_ID):
        _used.add(run_id)


def active_run_id() -> str | None:
    """Return the id of MLflow's active run; None if there is none or mlflow is not imported."""
    # Not `mlflow.active_run`, which autologging replaces.
    module: Any = sys.modules.get("mlflow.tracking.fluent")
    run = module.active_run() if module is not None and hasattr(module, "active_run") else None
    return None if run is None else str(run.info.run_id)


def is_active(run_id: str | None) -> bool:
    """Whether the run is on this thread's stack of active runs, which MLflow ends itself."""
    module: Any = sys.modules.get("mlflow.tracking.fluent")
    stack = getattr(module, "_active_run_stack", None)
    if stack is None:
        return run_id is not None and active_run_id() == run_id
    return any(run.info.run_id == run_id for run in stack.get())


def _is_elsewhere(tracking_uri: str | None) -> bool:
    if tracking_uri is None:
        return False
    theirs = sys.modules["mlflow"].get_tracking_uri()
    return absolute_sqlite(theirs).rstrip("/") != absolute_sqlite(tracking_uri).rstrip("/")


def absolute_sqlite(uri: str) -> str:
    """Make the (escaped) path of a ``sqlite:///`` URI absolute; escape ``?`` and ``%`` of the working directory."""
    prefix = "sqlite:///"
    if not uri.startswith(prefix) or uri.startswith(prefix + "/") or ":memory:" in uri:
        return uri
    path, mark, query = uri.removeprefix(prefix).partition("?")
    directory = str(Path.cwd()).translate(_ESCAPES)
    return f"{prefix}{Path(directory, path)}{mark}{query}"
