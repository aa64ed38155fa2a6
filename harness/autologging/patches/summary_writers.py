"""TensorBoard's writers under MLflow's own autologging, which gives MLflow what they are given.

MLflow logs it to the active run, and without one begins a run for each single event. Here it goes into ours, once: what
`accelerator.log` hands to accelerate's TensorBoard tracker is in the run already. MLflow is never imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import AcceleratorState

from harness.autologging.patches.other_ranks import known_run
from harness.autologging.replacements import Replacement
from harness.autologging.session import Session
from harness.tracking.mlflow.given_run import active_run_id

_MODULE = "mlflow.pytorch._pytorch_autolog"
_WHY = "what TensorBoard's writers are given, once"


class SummaryWriters:
    """Stands in where MLflow's autologging takes what a `SummaryWriter` is given.

    Effects: not collective; main thread; nothing on disk.

    Args:
        session: gives the training that runs.

    Attributes:
        is_within: in a call of accelerate's, which logs by itself what a tracker is given.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session
        self._run: Any = None
        self.is_within = False

    def table(self) -> list[Replacement]:
        """What is replaced."""
        return [
            Replacement("mlflow", "start_run", _WHY, self._start),
            Replacement("mlflow", "active_run", _WHY, lambda original: self._run or original()),
            Replacement("mlflow", "end_run", _WHY, self._end),
            Replacement(_MODULE, "add_to_metrics_queue", _WHY, self._event),
            Replacement(_MODULE, "patched_add_hparams", _WHY, self._hparams),
        ]

    def _is_ours(self) -> bool:
        """Whether what an event says goes into our run: there is no other that is meant."""
        session = self._session()
        if session.settings.exclusive or session.is_over or not AcceleratorState._shared_state:
            return False
        active = active_run_id()
        return active is None or session.logger is None or active == session.logger.mlflow_run_id

    def _start(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # As MLflow's autologging begins a run for the time of one call.
        is_managed = (kwargs.get("tags") or {}).get("mlflow.autologging") == "pytorch"
        if is_managed and active_run_id() is None and self._is_ours():
            self._run = known_run(lambda: self._end(lambda: None))
            return self._run
        return original(*args, **kwargs)

    def _end(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._run is None:
            return original(*args, **kwargs)
        self._run = None
        return None

    def _event(self, original: Callable[..., Any], key: str, value: float, step: int, time: int, run_id: str) -> None:
        if not self._is_ours() or (self._run is None and not self._session().has_begun and not self.is_within):
            original(key, value, step, time, run_id)
        elif not self.is_within:
            self._session().log({key: value}, step)

    def _hparams(
        self,
        original: Callable[..., Any],
        add: Callable[..., Any],
        writer: Any,
        values: Mapping[str, Any],
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._is_ours() or (self._run is None and not self.is_within):
            return original(add, writer, values, *rest, **kwargs)
        if not self.is_within:
            self._session().log_params(values)
        return add(writer, values, *rest, **kwargs)
