"""Which MLflow run the user has named: in the environment, or as the active run of MLflow's own functions.

    which run           the one in ``run.json``, MLFLOW_RUN_ID, the active run, a new one
    which experiment    of a new run: the argument, MLFLOW_EXPERIMENT_ID, MLFLOW_EXPERIMENT_NAME, ``default``

The first that there is counts. `mlflow.set_experiment` sets MLFLOW_EXPERIMENT_ID of its process, and `mlflow.start_run`
removes MLFLOW_RUN_ID. MLflow is never imported here.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any

from harness.tracking.journal.settings import absolute_sqlite

RUN_ID = "MLFLOW_RUN_ID"
EXPERIMENT_ID = "MLFLOW_EXPERIMENT_ID"

# MLFLOW_RUN_ID names one run: a second training of this process has a run of its own, as with `mlflow.start_run`.
_used: set[str] = set()


@dataclass(frozen=True)
class GivenRun:
    """An MLflow run that the user has made, and that a new training is to log to.

    Args:
        run_id: of the run.
        source: where it was named, for messages.
        notes: lines for the user.
    """

    run_id: str
    source: str
    notes: tuple[str, ...] = ()


def given_run(tracking_uri: str | None) -> GivenRun | None:
    """The run that the user has named, or None.

    Effects: not collective: rank zero looks, main thread, since MLflow's active run is one of a thread. The run of
    MLFLOW_RUN_ID is not given again after `mark_used`.

    Args:
        tracking_uri: as it is configured; None: the same as MLflow's own functions use.
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
    """A training logs to this run: if MLFLOW_RUN_ID names it, the next training of the process gets another."""
    if run_id is not None and run_id == os.environ.get(RUN_ID):
        _used.add(run_id)


def active_run_id() -> str | None:
    """The id of the run that MLflow's own functions log to; None if there is none, or MLflow is not imported."""
    # Not `mlflow.active_run`, which autologging replaces.
    module: Any = sys.modules.get("mlflow.tracking.fluent")
    run = module.active_run() if module is not None and hasattr(module, "active_run") else None
    return None if run is None else str(run.info.run_id)


def is_held(run_id: str | None) -> bool:
    """Whether the user's code has the run active in this thread, also below a nested one: MLflow itself ends it."""
    module: Any = sys.modules.get("mlflow.tracking.fluent")
    stack = getattr(module, "_active_run_stack", None)
    if stack is None:
        return run_id is not None and active_run_id() == run_id
    return any(run.info.run_id == run_id for run in stack.get())


def _is_elsewhere(tracking_uri: str | None) -> bool:
    """Whether the active run is in another store than the one that is configured."""
    if tracking_uri is None:
        return False
    theirs = sys.modules["mlflow"].get_tracking_uri()
    return absolute_sqlite(theirs).rstrip("/") != absolute_sqlite(tracking_uri).rstrip("/")
