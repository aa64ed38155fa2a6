"""Open the run of a training, with what the script logged before it."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from harness.autologging.context import AutologContext
from harness.autologging.script import Prepared
from harness.autologging.settings import FURTHER_FILE, AutologSettings, script_name
from harness.data import dataloaders
from harness.io.durable_files import replace_file
from harness.io.progress import Progress
from harness.metrics.values import LoggedValues
from harness.tracking import provenance
from harness.tracking.mlflow.given_run import GivenRun, active_run_id, given_run
from harness.training.periodic_logger import PeriodicLogger


def open_run(
    context: AutologContext, settings: AutologSettings, prepared: Prepared, params: Mapping[str, Any]
) -> PeriodicLogger:
    """Start the logger of a training, with the parameters that the script has already logged.

    Effects: collective; main thread; blocks and writes to disk as `PeriodicLogger.start`. On failure, an active MLflow
    run that was to be used ends as FAILED.

    Raises:
        HarnessError: on all ranks, if the run's directory or the store cannot be used.
    """
    given = _find_given_run(context) if prepared.is_rank_zero else None
    try:
        return _open_run(context, settings, prepared, params, given)
    except BaseException:
        # Otherwise MLflow ends the script's active run as FINISHED, since no run of ours can fail in its place.
        end_active_run(None if given is None else given.run_id, "FAILED")
        raise


def _open_run(
    context: AutologContext,
    settings: AutologSettings,
    prepared: Prepared,
    params: Mapping[str, Any],
    given: GivenRun | None,
) -> PeriodicLogger:
    accelerator = prepared.accelerator
    assert accelerator is not None
    sizes = [dataloaders.global_batch_size(loader, accelerator.num_processes) for loader in prepared.loaders[:1]]
    training = {
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "mixed_precision": accelerator.mixed_precision,
        **({"batch_size": sizes[0]} if sizes and sizes[0] is not None else {}),
    }
    arguments = context.arguments.current()
    args = {"args": dict(arguments)} if arguments else {}
    flat = provenance.flatten_params({**args, **prepared.hyperparameters, "training": training, **params})
    earlier = context.params_of_runs.setdefault(given.run_id, {}) if given is not None else {}
    changed = {name: value for name, value in flat.items() if earlier.get(name, value) != value}
    unchanged = {name: value for name, value in flat.items() if name not in changed}
    earlier.update(unchanged)
    logger = PeriodicLogger(
        accelerator,
        every_n_epochs=settings.checkpoint.every_n_epochs,
        run_name=settings.run_name,
        run_dir=settings.run_dir,
        checkpoint=settings.checkpoint,
        tracking=settings.tracking,
        params=unchanged,
        resume_from_checkpoint=settings.resume_from,
        seeds_workers=False,
        reset_scheduler=settings.reset_scheduler,
    )
    logger.progress = _Silent() if settings.tracking.silent else logger.progress
    logger.run_name_prefix = script_name()
    logger.given_run, logger.uses_given_run = given, False
    logger.start()
    if settings.first_run is not None and logger.run_path is not None and accelerator.is_main_process:
        replace_file(logger.run_path / FURTHER_FILE, json.dumps({"first_run": settings.first_run}) + "\n")
    if changed:
        values = ", ".join(f"{name}={value}" for name, value in changed.items())
        logger.say(
            f"harness: the MLflow run keeps the parameters of the earlier training; this training differs in {values}"
        )
    return logger


def _find_given_run(context: AutologContext) -> GivenRun | None:
    """Return the MLflow run that the user has named for this training; rank 0."""
    if context.settings.exclusive:
        return None
    context.saw_active_run(active_run_id())
    return given_run(context.settings.tracking.tracking_uri)


def end_active_run(run_id: str | None, status: str) -> None:
    """End a run that is active in MLflow's client, which would end it as FINISHED at exit."""
    if run_id is not None and active_run_id() == run_id:
        with suppress(Exception):  # the server is not reachable, which the publisher reports
            sys.modules["mlflow"].end_run(status)


class ScriptValues:
    """Logs the metrics and parameters that the script logs itself, from rank 0, unreduced.

    Effects: not collective; main thread; writes to disk only through the logger.
    """

    def __init__(self) -> None:
        self._logger: PeriodicLogger | None = None
        self._values = LoggedValues(self._say)
        self._early_metrics: list[tuple[Mapping[str, float], int | None]] = []
        # Kept until the run is open, since only the run knows whether it is silent.
        self._early_lines: list[str] = []
        self.early_params: dict[str, Any] = {}

    def run_opened(self, logger: PeriodicLogger) -> None:
        """Record the early metrics in the run, which was opened with `early_params`."""
        self._logger = logger
        for numbers, step in self._early_metrics:
            logger.record(numbers, step)
        for line in self._early_lines:
            logger.say(line)
        self._early_metrics.clear()
        self._early_lines.clear()

    def log(self, values: Mapping[str, Any], step: Any) -> None:
        """Record metrics. A value that is not a number is dropped, with one message for each name."""
        numbers, whole_step = self._values.numbers(values), self._values.step(step)
        if self._logger is None:
            self._early_metrics.append((numbers, whole_step))
        else:
            self._logger.record(numbers, whole_step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters."""
        if self._logger is None:
            self.early_params.update(values)
        else:
            self._logger.log_params(values)

    def _say(self, line: str) -> None:
        line = f"harness: autolog: {line}"
        if self._logger is None:
            self._early_lines.append(line)
        else:
            self._logger.say(line)


class _Silent(Progress):
    def __init__(self) -> None:
        super().__init__(enabled=False)

    def say(self, text: str) -> None:
        """Print nothing."""
