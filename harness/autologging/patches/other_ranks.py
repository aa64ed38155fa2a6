"""Disable MLflow calls on ranks other than 0, for scripts that do not check their rank.

Otherwise each rank would start a run beside the job's, or create the same database concurrently. Functions that read
(`mlflow.get_run`, a client) are not replaced. MLflow is never imported here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from harness.autologging.replacements import Function, Replacement
from harness.autologging.training_registry import TrainingRegistry
from harness.tracking.mlflow.given_run import active_run_id

# Functions of `mlflow` that write, and whose result is not used.
_WRITING = (
    *("set_tag", "set_tags", "delete_tag", "set_experiment_tag", "set_experiment_tags", "log_input", "log_inputs"),
    *("log_metric", "log_metrics", "log_params", "log_text", "log_dict", "log_figure", "log_image", "log_table"),
    *("log_artifact", "log_artifacts", "log_outputs", "log_model_params", "log_stream"),
)
# Modules whose `log_model` a training script calls.
_FLAVORS = ("mlflow.pytorch", "mlflow.pyfunc", "mlflow.transformers")


class OtherRanks:
    """Replaces MLflow's functions that write, on ranks other than 0.

    MLflow's own functions are called if the script names the run, has an active run on this rank, or autologging is
    `exclusive`.

    Effects: not collective; main thread; nothing on disk.
    """

    def __init__(self, registry: TrainingRegistry) -> None:
        self._registry = registry
        # The placeholders of active runs, outermost first.
        self._runs: list[Any] = []

    def table(self) -> list[Replacement]:
        """Return the replacements."""
        why = "rank 0 logs"
        results: dict[str, Function] = {
            **dict.fromkeys(_WRITING, _nothing),
            "log_param": _the_value,
            "start_run": self._start_run,
            "active_run": lambda: self._runs[-1] if self._runs else None,
            "end_run": self._end_run,
            "set_experiment": _experiment,
            "create_experiment": lambda *args, **kwargs: "",
        }
        rows = [Replacement("mlflow", name, why, self._instead(result)) for name, result in results.items()]
        return rows + [Replacement(each, "log_model", why, self._instead(_model)) for each in _FLAVORS]

    def _instead(self, result: Function) -> Function:
        def around(original: Function, *args: Any, **kwargs: Any) -> Any:
            is_replaced = self._is_other_rank and kwargs.get("run_id") is None and active_run_id() is None
            return result(*args, **kwargs) if is_replaced else original(*args, **kwargs)

        return around

    @property
    def _is_other_rank(self) -> bool:
        session = self._registry.session
        accelerator = session.prepared.accelerator
        # Use the launcher's rank until the script has an accelerator.
        rank = os.environ.get("RANK", "0") if accelerator is None else accelerator.process_index
        return not session.settings.exclusive and int(rank) != 0

    def _start_run(self, *args: Any, **kwargs: Any) -> Any:
        self._runs.append(placeholder_run(self._end_run))
        return self._runs[-1]

    def _end_run(self, *args: Any, **kwargs: Any) -> None:
        if self._runs:
            self._runs.pop()


def placeholder_run(end: Callable[[], Any]) -> Any:
    """Make an MLflow object for an active run whose id and data are not known; `end` is called when its `with` ends."""
    mlflow: Any = sys.modules["mlflow"]
    entities: Any = sys.modules["mlflow.entities"]

    class PlaceholderRun(mlflow.ActiveRun):  # type: ignore[misc]
        """Its end does not end a run in MLflow."""

        def __exit__(self, *error: Any) -> bool:
            end()
            return error[0] is None

    info = entities.RunInfo("known-to-rank-zero", "", "", "RUNNING", 0, None, "active")
    return PlaceholderRun(entities.Run(info, entities.RunData()))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _the_value(key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _experiment(experiment_name: str | None = None, experiment_id: str | None = None, **kwargs: Any) -> Any:
    entities: Any = sys.modules["mlflow.entities"]
    return entities.Experiment(experiment_id or "", experiment_name or "", "", "active")


def _model(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(model_uri="", model_id="", run_id="known-to-rank-zero")
