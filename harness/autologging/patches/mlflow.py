"""What a script logs to MLflow itself: into the same run, once.

MLflow is never imported here: its functions come as arguments, once the script has imported it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from harness.autologging.session import Session
from harness.io.redact import redact_named
from harness.tracking.mlflow.given_run import active_run_id

Function = Callable[..., Any]


class MlflowPatches:
    """Stands in for MLflow's functions that log to the active run.

    Effects: not collective; rank zero, or where another rank has an active run of its own; main thread.

    Args:
        session: gives the training that runs.
        run_id_before: gives the id of the run that the training would go on in, before it has begun.
        run_id_after: likewise, of the training that comes after the one that runs.
    """

    def __init__(
        self,
        session: Callable[[], Session],
        run_id_before: Callable[[], str | None],
        run_id_after: Callable[[], str | None],
    ) -> None:
        self._session = session
        self._run_id_before = run_id_before
        self._run_id_after = run_id_after
        # Within a call that hands the same values on: once is enough.
        self.is_within = False
        self._were_active: set[str] = set()

    def saw_active(self, run_id: str | None) -> None:
        """A run is the script's active one: once it is so no more, the script is done with it."""
        if run_id is not None:
            self._were_active.add(run_id)

    def start_run(self, original: Function, run_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """`mlflow.start_run`: of the run that is ours already, or that the training goes on in."""
        is_own = run_id is not None or "MLFLOW_RUN_ID" in os.environ or len(args) > 2
        ours = None if is_own or self._session().settings.exclusive else self._ours(kwargs)
        if ours is None:
            return original(run_id, *args, **kwargs)
        try:
            started = original(ours, *args, **kwargs)
        except Exception:
            # Of another experiment or server: it is the script's own then.
            return original(run_id, *args, **kwargs)
        self.saw_active(ours)
        return started

    def _ours(self, asked: Mapping[str, Any]) -> str | None:
        """The run that the script means as it begins one; None: another, of its own."""
        session = self._session()
        parent_id = asked.get("parent_run_id") or (active_run_id() if asked.get("nested") else None)
        ours = None if session.logger is None or session.is_over else session.logger.mlflow_run_id
        if ours is not None and (ours not in self._were_active or ours == active_run_id()):
            return ours if parent_id is None else None
        before = self._run_id_before() if session.logger is None else self._run_id_after()
        found = None if before is None else _with_parent(before, parent_id)
        return None if found in self._were_active else found

    def log_metric(self, original: Function, key: str, value: Any, step: int | None = None, **kwargs: Any) -> Any:
        """`mlflow.log_metric`."""
        return self._log(lambda: original(key, value, step=step, **kwargs), {key: value}, step, kwargs)

    def log_metrics(
        self, original: Function, metrics: Mapping[str, Any], step: int | None = None, **kwargs: Any
    ) -> Any:
        """`mlflow.log_metrics`."""
        return self._log(lambda: original(metrics, step=step, **kwargs), metrics, step, kwargs)

    def _log(self, call: Function, values: Mapping[str, Any], step: int | None, others: Mapping[str, Any]) -> Any:
        session = self._session()
        if self._is_for_another(session, others):
            return call()
        if not self.is_within:
            session.log(values, step)
        return None

    def log_param(self, original: Function, key: str, value: Any, **kwargs: Any) -> Any:
        """`mlflow.log_param`, which gives the value back."""
        if not self._takes_params({key: value}, kwargs):
            original(key, self._redacted({key: value})[key], **kwargs)
        return value

    def log_params(self, original: Function, params: Mapping[str, Any], **kwargs: Any) -> Any:
        """`mlflow.log_params`."""
        return None if self._takes_params(params, kwargs) else original(self._redacted(params), **kwargs)

    def _redacted(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """What goes to MLflow as it is: the run may become ours, and ours has no secrets in it."""
        return values if self._session().settings.exclusive else redact_named(values)

    def _takes_params(self, values: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Whether the run takes them: MLflow itself would refuse, in a run that goes on, those that have changed."""
        session = self._session()
        goes_on = not session.has_begun and self._run_id_before() is not None
        if not goes_on and self._is_for_another(session, others):
            return False
        session.log_params(values)
        return True

    def _is_for_another(self, session: Session, others: Mapping[str, Any]) -> bool:
        """Whether a call means another run than ours, or there is none yet."""
        if session.settings.exclusive or any(
            value is not None for name, value in others.items() if name != "synchronous"
        ):
            return True
        if not session.has_begun or session.is_over:
            return True
        assert session.logger is not None
        active = active_run_id()
        return active is not None and active != session.logger.mlflow_run_id


def _with_parent(run_id: str, parent_id: str | None) -> str | None:
    """A run, or the one that it is nested in, and so on: which of them is nested in this one, or in none."""
    found: str | None = run_id
    with suppress(Exception):  # it is deleted, or of another server
        while found is not None:
            above = sys.modules["mlflow"].get_run(found).data.tags.get("mlflow.parentRunId")
            if above == parent_id:
                return found
            found = above
    return None


def end_active_run(run_id: str | None, status: str) -> None:
    """End our run in MLflow's own eyes too: left to the end of the process it would call a failed one FINISHED."""
    if run_id is not None and active_run_id() == run_id:
        with suppress(Exception):  # the server is away: the publisher says it in any case
            sys.modules["mlflow"].end_run(status)
