"""Deliver the values of `accelerator.log` to MLflow without blocking the script: `HarnessTracker`.

    accelerator = Accelerator(log_with=HarnessTracker("my-experiment", run_name="vit"))
    accelerator.init_trackers("", config={"lr": 1e-3})
    accelerator.log({"train/loss": loss}, step=step)
    accelerator.end_training()

It only tracks: a script with its own loop and checkpoints gets a run directory with the outbox, and a process that
delivers it. Accelerate resolves only its own trackers by name, so ``log_with="harness"`` is not possible, and it does
not pass the project's name to a tracker object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker, on_main_process

from harness.autologging.exit_hooks import ExceptHook
from harness.config.schema import TrackingConfig
from harness.errors import HarnessError, Stopped
from harness.io.redact import redact_message
from harness.io.standard_streams import write_error
from harness.metrics.values import LoggedValues
from harness.run.directory import RunDirectory, make_run_directory
from harness.run.lock import RunLock
from harness.tracking import provenance
from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.mlflow.given_run import given_run
from harness.tracking.publisher.sync import undelivered_line
from harness.tracking.tracker import RunStatus, Tracker
from harness.training.run_session import FAILURE_WAIT_S


class HarnessTracker(GeneralTracker):  # type: ignore[misc]
    """Delivers what an `Accelerator` logs to MLflow; for checkpoints too, use `PeriodicLogger`.

    Effects: acts on rank 0 alone; not collective. `start` waits for the run's id, and `finish` for the delivery, at
    most ``tracking.drain_timeout_s``; the other methods only append to a file. Creates ``<run_dir>/<run_name>/``. The
    run ends as FAILED if an exception ends the process (KILLED for `KeyboardInterrupt`), if the process ends without
    ``accelerator.end_training()``, and if the next run begins while this one is open.

    Args:
        experiment_name: the MLflow experiment; None for that of ``MLFLOW_EXPERIMENT_ID`` (set by
            `mlflow.set_experiment`) or of ``MLFLOW_EXPERIMENT_NAME``, or else ``default``.
        run_name: name of the run's directory and of the MLflow run; None for a generated name. If the run exists, it is
            resumed, and points that it already has are not sent again.
        tracking: all other options of tracking.
    """

    name = "harness"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        experiment_name: str | None = None,
        run_name: str | None = None,
        run_dir: str | Path = "runs",
        tracking: TrackingConfig | None = None,
    ) -> None:
        super().__init__()
        self._run_name = run_name
        self._runs_dir = Path(run_dir)
        config = tracking or TrackingConfig()
        self._config = replace(config, experiment_name=experiment_name or config.experiment_name)
        self._tracker: Tracker | None = None
        self._lock: RunLock | None = None
        self._directory: RunDirectory | None = None
        self._except_hook = ExceptHook()
        self._step: int | None = None
        self._values = LoggedValues(self._warn)

    @property
    def tracker(self) -> Tracker | None:
        """The client that appends to the outbox, on rank 0 while a run is open."""
        return self._tracker

    @property
    def run_path(self) -> Path | None:
        """The run's directory, on rank 0 once it exists."""
        return None if self._directory is None else self._directory.path

    @on_main_process  # type: ignore[untyped-decorator]
    def start(self) -> None:
        """Create the run's directory and the MLflow run; its id is on disk when this returns.

        Raises:
            HarnessError: if the directory or the store cannot be used, or the accelerator has this tracker twice.
        """
        if self._tracker is not None:
            if self._step is None:
                # The accelerator keeps the trackers of earlier `init_trackers` calls, and would log each value twice.
                raise HarnessError(
                    "HarnessTracker: init_trackers was called twice on this Accelerator, which now has the tracker "
                    "twice; make an Accelerator and a HarnessTracker for each run"
                )
            self._end("FAILED", "training was abandoned: another one began in the same process", FAILURE_WAIT_S)
        self._step = None
        config = self._config
        directory, self._lock = make_run_directory(self._runs_dir, self._run_name, config.experiment_name, "auto")
        self._directory = directory
        state = AcceleratorState()
        facts = {"world_size": str(state.num_processes), "device": state.device.type}
        tracker = Tracker(directory.path, config, directory.attempt)
        tracker.given_run = given_run(config.tracking_uri)
        try:
            tracker.start(directory.name, provenance.attempt_facts(facts))
        except BaseException:
            self._lock.release()
            raise
        for note in () if config.silent else tracker.notes:
            _say(note)
        tracker.set_tags(provenance.tags(facts, config.tags))
        self._show_warnings(tracker)
        self._tracker = tracker
        self._except_hook.install(self)

    @on_main_process  # type: ignore[untyped-decorator]
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Log the run's parameters. Nested ones get dotted names."""
        if self._tracker is not None:
            drift = self._tracker.log_params(provenance.flatten_params(values))
            if drift.changed:
                _say(f"parameters have changed since the run began: {drift.as_line()}")
            self._show_warnings(self._tracker)

    @on_main_process  # type: ignore[untyped-decorator]
    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Log metrics at a step. A value that is not a number is dropped, with one warning for each name.

        Effects: waits for tensors on a device.

        Args:
            values: name -> number, or tensor of one element.
            step: step of the run; the next one after the latest if None, or if not a 64-bit integer.
        """
        tracker = self._tracker
        if tracker is None:
            return
        step = self._values.step(step)
        if step is None:
            step = 0 if self._step is None else self._step + 1
        if self._step is None and self._directory is not None and self._directory.continues:
            # The script restores its own state, so its first logged step is where it resumed.
            tracker.resume_from(step, None)
        self._step = step
        if numbers := self._values.numbers(values):
            tracker.log_metrics(numbers, step)
        self._show_warnings(tracker)

    @on_main_process  # type: ignore[untyped-decorator]
    def finish(self) -> None:
        """End the run as FINISHED, and wait for the delivery."""
        self._end("FINISHED", "the script has ended its training", self._config.drain_timeout_s)

    def _warn(self, line: str) -> None:
        if not self._config.silent:
            _say(f"harness: warning: {line}")

    def _show_warnings(self, tracker: Tracker) -> None:
        for warning in tracker.pop_warnings():
            self._warn(warning)

    def fail(self, error: BaseException) -> BaseException:
        """End the run with the exception that ends the process; returns that exception."""
        is_stop = isinstance(error, (KeyboardInterrupt, Stopped))
        reason = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        self._end("KILLED" if is_stop else "FAILED", redact_message(reason), FAILURE_WAIT_S)
        return error

    def _end(self, status: RunStatus, reason: str, timeout_s: float) -> None:
        tracker, self._tracker = self._tracker, None
        if tracker is None:
            return
        self._except_hook.remove()
        try:
            if not tracker.finish(status, reason, timeout_s, lambda _: True) and self._config.enabled:
                _say(undelivered_line(tracker.run_dir, read_delivered(tracker.run_dir / "outbox")))
        except HarnessError as error:
            tracker.detach()
            _say(f"harness: warning: {error}")
        if self._lock is not None:
            self._lock.release()


def _say(line: str) -> None:
    write_error(f"{line}\n")
