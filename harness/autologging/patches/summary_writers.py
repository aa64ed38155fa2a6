"""Log the values of TensorBoard's writers to our run, once, under MLflow's own autologging.

MLflow would log them to the active run, and without one start a run for each event. Values of `accelerator.log` that
accelerate's TensorBoard tracker writes are already in our run. MLflow is never imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState

from harness.autologging.patches.other_ranks import placeholder_run
from harness.autologging.replacements import Function, Replacement
from harness.autologging.training_registry import TrainingRegistry
from harness.tracking.mlflow.given_run import active_run_id

_MODULE = "mlflow.pytorch._pytorch_autolog"
_WHY = "log the values of TensorBoard's writers once"


class SummaryWriters:
    """Replaces the functions by which MLflow's autologging logs the values of a `SummaryWriter`.

    Effects: not collective; main thread; nothing on disk.
    """

    def __init__(self, registry: TrainingRegistry) -> None:
        self._registry = registry
        self._context = registry.context
        # The placeholder for a run that MLflow's autologging starts for one event.
        self._run: Any = None

    def table(self) -> list[Replacement]:
        """Return the replacements."""
        return [
            Replacement("mlflow", "start_run", _WHY, self._start_run),
            Replacement("mlflow", "active_run", _WHY, lambda original: self._run or original()),
            Replacement("mlflow", "end_run", _WHY, self._end_run),
            Replacement(_MODULE, "add_to_metrics_queue", _WHY, self._add_event),
            Replacement(_MODULE, "patched_add_hparams", _WHY, self._add_hparams),
        ]

    def _is_ours(self) -> bool:
        """Whether an event belongs to our run, since no other run is active."""
        session = self._registry.session
        if session.settings.exclusive or session.is_over or not AcceleratorState._shared_state:
            return False
        active = active_run_id()
        return active is None or session.logger is None or active == session.logger.mlflow_run_id

    def _start_run(self, original: Function, *args: Any, **kwargs: Any) -> Any:
        # MLflow's autologging sets this tag on a run that it starts for one call.
        is_managed = (kwargs.get("tags") or {}).get("mlflow.autologging") == "pytorch"
        if is_managed and active_run_id() is None and self._is_ours():
            self._run = placeholder_run(lambda: self._end_run(lambda: None))
            return self._run
        return original(*args, **kwargs)

    def _end_run(self, original: Function, *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return original(*args, **kwargs)
        self._run = None
        return None

    def _add_event(self, original: Function, key: str, value: float, step: int, time: int, run_id: str) -> None:
        if not self._is_ours() or (
            self._run is None and not self._registry.session.has_begun and not self._context.is_in_tracker
        ):
            original(key, value, step, time, run_id)
        elif not self._context.is_in_tracker:
            self._registry.session.log({key: value}, step)

    def _add_hparams(
        self,
        original: Function,
        add: Function,
        writer: Any,
        values: Mapping[str, Any],
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._is_ours() or (self._run is None and not self._context.is_in_tracker):
            return original(add, writer, values, *rest, **kwargs)
        if not self._context.is_in_tracker:
            self._registry.session.log_params(values)
        return add(writer, values, *rest, **kwargs)
