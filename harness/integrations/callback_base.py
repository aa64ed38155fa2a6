"""Log and checkpoint a run in the training loop of another framework.

    begin  ->  (begin_epoch  ->  batch_done ...  ->  end_epoch) ...  ->  end, or fail  ->  report (test metrics)

The frameworks' callbacks are thin layers over `CallbackBase`. They differ in where they find the parts of the training,
how they stop the loop, and whether the framework reports a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from harness.autologging import patcher
from harness.autologging.exit_hooks import ExceptHook
from harness.checkpoint.format.names import some
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.distributed.launch_identity import is_launcher_rank_zero
from harness.errors import HarnessError, Stopped, TrackingError
from harness.io.progress import Progress
from harness.io.standard_streams import write_error
from harness.metrics.values import LoggedValues
from harness.models.model_spec import ExampleSource
from harness.run.directory import read_run_record
from harness.run.lock import RunLock
from harness.tracking.journal.logged_points import Point
from harness.tracking.tracker import Tracker
from harness.training.periodic_logger import PeriodicLogger


@dataclass(frozen=True)
class CallbackOptions:
    """Configures a callback as `PeriodicLogger`, but `checkpoint` defaults to ``when_busy="wait"``.

    Args:
        params: parameters to log beside the framework's.
        input_example: an input batch of the model, for its signature in MLflow.
    """

    every_n_epochs: int | None = 5
    experiment_name: str | None = None
    run_name: str | None = None
    run_dir: str | Path = "runs"
    checkpoint: CheckpointConfig | None = None
    tracking: TrackingConfig | None = None
    params: Mapping[str, Any] | None = None
    input_example: ExampleSource = None


@dataclass(frozen=True)
class CallbackModelSpec:
    """Describes how a framework's model is rebuilt.

    Args:
        spec: its class, or a class that builds it.
        files: name -> text of the files that the framework reads beside the weights.
    """

    spec: ClassSpec
    packages: tuple[str, ...]
    files: Mapping[str, str]


class CallbackBase:
    """Drives a `PeriodicLogger` from a framework's events.

    Effects: as `PeriodicLogger`: every event is collective, main thread. An error in an event ends the run before it is
    raised; `Stopped` does not, since the framework may save its own checkpoint first. While a run is open, an exception
    that ends the process ends the run too.
    """

    # The callback of this process whose run is open.
    _open: ClassVar[CallbackBase | None] = None

    def __init__(self, options: CallbackOptions) -> None:
        self.options = options
        self._logger: PeriodicLogger | None = None
        # On rank 0, the latest run if it ended without an error.
        self._ended: EndedRun | None = None
        self._has_warned_of_no_run = False
        self._except_hook = ExceptHook()

    @property
    def logger(self) -> PeriodicLogger:
        """The logger of the open run."""
        assert self._logger is not None
        return self._logger

    @property
    def is_open(self) -> bool:
        """Whether a run is open."""
        return self._logger is not None

    def begin(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        *,
        completed: tuple[int, int],
        params: Mapping[str, Any],
        model_spec: CallbackModelSpec | str,
        topology: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin or resume a training, in the run of the given name. Turns `harness.autolog` off.

        Args:
            accelerator: an accelerator with the framework's ranks and strategy.
            model: as trained, so wrapped and sharded.
            optimizer: None for a checkpoint without optimizer state.
            scheduler: the learning-rate scheduler, if its state can be saved.
            completed: completed epochs and steps.
            params: the framework's configuration.
            model_spec: how to rebuild the model, or why that is not known.
            topology: fields of `Topology` that the accelerator does not know.
        """
        CallbackBase.fail_open_run()
        CallbackBase._open, self._ended = self, None
        # Autologging would log the same training to a second run.
        patcher.turn_off(reports_unseen=False)
        options = self.options
        logger = self._logger = PeriodicLogger(
            accelerator,
            options.every_n_epochs,
            options.experiment_name,
            options.run_name,
            options.run_dir,
            # Write every checkpoint that the user asked for, even if epochs are shorter than a save.
            options.checkpoint or CheckpointConfig(when_busy="wait"),
            options.tracking,
            {**params, **(options.params or {})},
        )
        logger.topology = replace(logger.topology, **(topology or {}))
        self._except_hook.install(self)
        with self._failing_run():
            logger.start()
            if isinstance(model_spec, CallbackModelSpec):
                logger.describe(
                    model_spec.spec,
                    model,
                    options.input_example,
                    packages=model_spec.packages,
                    files=model_spec.files,
                )
            else:
                logger.say(model_spec)
            logger.watch(model, optimizer, scheduler, completed=completed)

    @classmethod
    def fail_open_run(cls) -> None:
        """End an open run as failed: in a notebook an error ends the training but not the process."""
        if cls._open is not None:
            cls._open.fail(HarnessError("training was abandoned: another one began in the same process"))

    def begin_epoch(self) -> None:
        """Begin an epoch."""
        with self._failing_run():
            self.logger.events.begin_epoch()

    def batch_done(self, num_samples: int, *, is_loaders_last: bool, step: int) -> None:
        """Report a batch (see `TrainingController.batch_done`), and finish the copy of a save that it starts."""
        with self._failing_run():
            self.logger.events.batch_done(num_samples, is_loaders_last=is_loaders_last, step=step)
        self.finish_copy()

    def report(self, values: Mapping[str, Any]) -> None:
        """Record reduced values; see `PeriodicLogger.report`.

        After the end of training they are added to its run, and rank 0 waits until MLflow has them. If no training has
        begun or the last one failed, they are dropped, with one message.
        """
        if self._logger is not None:
            with self._failing_run():
                self._logger.report(values)
        elif self._ended is not None and values:
            self._ended.log(values)
        elif values and not self._has_warned_of_no_run and _is_rank_zero():
            self._has_warned_of_no_run = True
            names = some(sorted(map(str, values)), 4)
            write_error(f"harness: no training has begun, or it has failed, so {names} are in no run\n")

    def evaluated(self) -> None:
        """Exclude the time of an evaluation from the next step."""
        if self._logger is not None:
            self._logger.events.restart_step_timer()

    def freeze_learning_rates(self) -> None:
        """Report the current learning rates as the epoch's, before they change for the next epoch."""
        if self._logger is not None:
            self._logger.events.freeze_learning_rates()

    def end_epoch(self, *, is_whole: bool = True, is_last: bool = False) -> None:
        """End an epoch (see `TrainingController.end_epoch`), and finish the copy of a save that it starts."""
        with self._failing_run():
            self.logger.events.end_epoch(is_whole=is_whole, is_last=is_last)
        self.finish_copy()

    def finish_copy(self) -> None:
        """Block until the running save has copied everything: the framework and its callbacks may change weights."""
        if self._logger is not None:
            with self._failing_run():
                self.logger.events.finish_copy()

    def end(self) -> None:
        """End the run as FINISHED."""
        logger = self.logger
        with self._failing_run():
            logger.close()
        self._close()
        if logger.topology.rank == 0 and logger.run_path is not None and logger.run_name is not None:
            self._ended = EndedRun(
                logger.run_path, logger.run_name, logger.tracking_config, logger.step, logger.progress
            )

    def fail(self, error: BaseException) -> BaseException:
        """End the open run, if any, with an error or `Stopped`; returns the error that really ended the training."""
        if self._logger is None:
            return error
        logger = self._logger
        self._close()
        return logger.fail(error)

    @contextmanager
    def _failing_run(self) -> Iterator[None]:
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            cause = self.fail(error)
            if cause is not error:
                raise cause from error
            raise

    def _close(self) -> None:
        self._logger = CallbackBase._open = None
        self._except_hook.remove()


def _is_rank_zero() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return is_launcher_rank_zero()


@dataclass(frozen=True)
class EndedRun:
    """Adds the metrics of a test or an evaluation to a FINISHED run, on rank 0.

    Once training has ended, the run has no lock, no signal handler and no publisher. The metrics and a second end entry
    are appended to the journal as part of the same attempt, so the run stays FINISHED. `step` is the number of
    optimizer steps that were complete at the end.
    """

    path: Path
    name: str
    config: TrackingConfig
    step: int
    progress: Progress

    def log(self, values: Mapping[str, Any]) -> None:
        """Append the metrics at the last step, and wait for their delivery; see `LoggedValues` for what is a number.

        Effects: not collective; main thread; blocks at most ``tracking.start_timeout_s`` and
        ``tracking.drain_timeout_s``. Metrics that cannot be delivered stay in the journal for `harness sync`, with a
        warning.
        """
        try:
            lock = RunLock(self.path)
        except (HarnessError, OSError) as error:
            self.progress.say(f"harness: warning: {', '.join(values)} are not in the run: {error}")
            return
        try:
            self._log(LoggedValues(self.progress.say).numbers(values))
        except (HarnessError, OSError) as error:
            self.progress.say(
                f"harness: warning: {', '.join(values)} are not in MLflow: {error}; "
                f"`harness sync {self.path}` delivers what is in the journal"
            )
        finally:
            lock.release()

    def _log(self, values: Mapping[str, float]) -> None:
        # Read the attempt now: another job may have resumed the run.
        tracker = Tracker(self.path, self.config, read_run_record(self.path).get("attempt", 1))
        try:
            self._add(tracker, values)
        finally:
            tracker.journal.close()
            for line in tracker.pop_warnings():
                self.progress.say(line)

    def _add(self, tracker: Tracker, values: Mapping[str, float]) -> None:
        # An evaluation that repeats the last epoch's has its values already.
        there = tracker.points_at(values, self.step)
        values = {
            key: value for key, value in values.items() if not _is_at(self.step, there.get(tracker.metric_name(key)))
        }
        if not values:
            return
        is_delivered = tracker.log_after_finish(
            self.name, values, self.step, "training is complete, and was evaluated", self.config.drain_timeout_s
        )
        if not is_delivered and self.config.enabled and not self.config.offline:
            raise TrackingError("not everything was delivered in time")


def _is_at(step: int, point: Point | None) -> bool:
    return point is not None and point.step == step
