"""Log to our run, once, what a script logs to MLflow itself.

MLflow is never imported here; its functions are received as arguments once the script has imported it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from harness.autologging.replacements import Function, Replacement
from harness.autologging.session import Session
from harness.autologging.training_registry import TrainingRegistry
from harness.io.redact import redact_named
from harness.tracking.mlflow.given_run import active_run_id


class MlflowPatches:
    """Replaces MLflow's functions that log to the active run.

    Effects: not collective; rank 0, or another rank that has its own active run; main thread.
    """

    def __init__(self, registry: TrainingRegistry) -> None:
        self._registry = registry
        self._context = registry.context

    def table(self) -> list[Replacement]:
        """Return the replacements."""
        return [
            Replacement("mlflow", "start_run", "one run for the script and for us", self._start_run),
            Replacement("mlflow", "log_metric", "the script's metrics", self._log_metric),
            Replacement("mlflow", "log_metrics", "the script's metrics", self._log_metrics),
            Replacement("mlflow", "log_param", "the script's parameters", self._log_param),
            Replacement("mlflow", "log_params", "the script's parameters", self._log_params),
        ]

    def _start_run(self, original: Function, run_id: str | None = None, *args: Any, **kwargs: Any) -> Any:
        """Start our run, or the one that the training resumes, unless the script names one."""
        is_named = run_id is not None or "MLFLOW_RUN_ID" in os.environ or len(args) > 2
        ours = None if is_named or self._registry.session.settings.exclusive else self._own_run_id(kwargs)
        if ours is None:
            return original(run_id, *args, **kwargs)
        try:
            started = original(ours, *args, **kwargs)
        except Exception:
            # The run belongs to another experiment or server, so the script starts its own.
            return original(run_id, *args, **kwargs)
        self._context.saw_active_run(ours)
        return started

    def _own_run_id(self, options: Mapping[str, Any]) -> str | None:
        """Return the run of ours that `start_run` should use; None if the script starts a new one."""
        session, ended = self._registry.session, self._context.active_run_ids
        parent_id = options.get("parent_run_id") or (active_run_id() if options.get("nested") else None)
        ours = session.logger.mlflow_run_id if session.logger is not None and session.is_running else None
        if ours is not None and (ours not in ended or ours == active_run_id()):
            return ours if parent_id is None else None
        registry = self._registry
        resumed = registry.next_run_id_to_resume() if session.has_begun else registry.run_id_to_resume()
        found = None if resumed is None else _with_parent(resumed, parent_id)
        return None if found in ended else found

    def _log_metric(self, original: Function, key: str, value: Any, step: int | None = None, **kwargs: Any) -> Any:
        return self._log(lambda: original(key, value, step=step, **kwargs), {key: value}, step, kwargs)

    def _log_metrics(
        self, original: Function, metrics: Mapping[str, Any], step: int | None = None, **kwargs: Any
    ) -> Any:
        return self._log(lambda: original(metrics, step=step, **kwargs), metrics, step, kwargs)

    def _log(
        self, call: Callable[[], Any], values: Mapping[str, Any], step: int | None, options: Mapping[str, Any]
    ) -> Any:
        session = self._registry.session
        if self._is_for_other_run(session, options):
            return call()
        if not self._context.is_logged_already:
            session.log(values, step)
        return None

    def _log_param(self, original: Function, key: str, value: Any, **kwargs: Any) -> Any:
        if not self._log_params_to_own({key: value}, kwargs):
            original(key, self._redacted({key: value})[key], **kwargs)
        return value  # as MLflow does

    def _log_params(self, original: Function, params: Mapping[str, Any], **kwargs: Any) -> Any:
        return None if self._log_params_to_own(params, kwargs) else original(self._redacted(params), **kwargs)

    def _redacted(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Redact values for MLflow's own function, since its run may become ours, which has no secrets."""
        return values if self._registry.session.settings.exclusive else redact_named(values)

    def _log_params_to_own(self, values: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
        """Log parameters to our run; False if they are for another one.

        MLflow refuses changed parameters in a resumed run, so parameters that the script logs early go to our run too.
        """
        session = self._registry.session
        is_early = not session.has_begun and self._registry.run_id_to_resume() is not None
        if not is_early and self._is_for_other_run(session, options):
            return False
        session.log_params(values)
        return True

    def _is_for_other_run(self, session: Session, options: Mapping[str, Any]) -> bool:
        """Whether a call is for a run other than ours, or ours is not open."""
        has_options = any(value is not None for name, value in options.items() if name != "synchronous")
        if session.settings.exclusive or has_options or session.logger is None or session.is_over:
            return True
        active = active_run_id()
        return active is not None and active != session.logger.mlflow_run_id


def _with_parent(run_id: str, parent_id: str | None) -> str | None:
    """Return the run or its nearest ancestor that is nested in `parent_id`, or in no run for None; None if none is."""
    found: str | None = run_id
    with suppress(Exception):  # it was deleted, or belongs to another server
        while found is not None:
            above = sys.modules["mlflow"].get_run(found).data.tags.get("mlflow.parentRunId")
            if above == parent_id:
                return found
            found = above
    return None
