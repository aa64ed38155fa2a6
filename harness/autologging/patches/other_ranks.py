"""What a script does with MLflow on ranks other than zero, where it does not ask which rank it is: nothing.

Each of them would begin a run of its own, beside the one of the job, or make the same database at the same time.
MLflow is never imported here; what it reads (`mlflow.get_run`, a client) is left as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from harness.autologging.replacements import Replacement
from harness.autologging.session import Session
from harness.tracking.mlflow.given_run import active_run_id

# Functions of `mlflow` that write and whose result nobody uses.
_WRITING = (
    *("set_tag", "set_tags", "delete_tag", "set_experiment_tag", "set_experiment_tags", "log_input", "log_inputs"),
    *("log_metric", "log_metrics", "log_params", "log_text", "log_dict", "log_figure", "log_image", "log_table"),
    *("log_artifact", "log_artifacts", "log_outputs", "log_model_params", "log_stream"),
)
# Its flavours that a training script logs a model with.
_FLAVOURS = ("mlflow.pytorch", "mlflow.pyfunc", "mlflow.transformers")


class OtherRanks:
    """Stands in for MLflow's functions that write, on ranks other than zero.

    Where a script says which run it means, has an active one of its own there (by its id), or autologging is
    `exclusive`, they are left as they are.

    Effects: not collective; main thread; nothing on disk.

    Args:
        session: gives the training that runs.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session
        # The script's, each nested in the one before.
        self._runs: list[Any] = []

    def table(self) -> list[Replacement]:
        """What is replaced: around what `fluent` puts there, which is then asked on rank zero alone."""
        why = "rank zero's affair"
        results: dict[str, Callable[..., Any]] = {
            **dict.fromkeys(_WRITING, _nothing),
            "log_param": _the_value,
            "start_run": self._begin,
            "active_run": lambda: self._runs[-1] if self._runs else None,
            "end_run": self._end,
            "set_experiment": _experiment,
            "create_experiment": lambda *args, **kwargs: "",
        }
        rows = [Replacement("mlflow", name, why, self._instead(result)) for name, result in results.items()]
        return rows + [Replacement(each, "log_model", why, self._instead(_model)) for each in _FLAVOURS]

    def _instead(self, result: Callable[..., Any]) -> Callable[..., Any]:
        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            is_there = self._is_other_rank and kwargs.get("run_id") is None and active_run_id() is None
            return result(*args, **kwargs) if is_there else original(*args, **kwargs)

        return around

    @property
    def _is_other_rank(self) -> bool:
        session = self._session()
        accelerator = session.prepared.accelerator
        # Before the script has an accelerator, as the launcher has it.
        rank = os.environ.get("RANK", "0") if accelerator is None else accelerator.process_index
        return not session.settings.exclusive and int(rank) != 0

    def _begin(self, *args: Any, **kwargs: Any) -> Any:
        self._runs.append(known_run(self._end))
        return self._runs[-1]

    def _end(self, *args: Any, **kwargs: Any) -> None:
        if self._runs:
            self._runs.pop()


def known_run(end: Callable[[], Any]) -> Any:
    """An active run as MLflow gives one, of which no more is known than that it is there.

    Args:
        end: called when a `with` around it is left.
    """
    mlflow: Any = sys.modules["mlflow"]
    entities: Any = sys.modules["mlflow.entities"]

    class KnownRun(mlflow.ActiveRun):  # type: ignore[misc]
        """MLflow's own leaves alone what it has not begun."""

        def __exit__(self, *error: Any) -> bool:
            end()
            return error[0] is None

    info = entities.RunInfo("known-to-rank-zero", "", "", "RUNNING", 0, None, "active")
    return KnownRun(entities.Run(info, entities.RunData()))


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Nothing is logged."""


def _the_value(key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
    return value


def _experiment(experiment_name: str | None = None, experiment_id: str | None = None, **kwargs: Any) -> Any:
    entities: Any = sys.modules["mlflow.entities"]
    return entities.Experiment(experiment_id or "", experiment_name or "", "", "active")


def _model(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(model_uri="", model_id="", run_id="known-to-rank-zero")
