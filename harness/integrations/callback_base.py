"""A run in a loop that is somebody else's: begun by its first event, and ended as it really ended.

begin  ->  (begin_epoch  ->  batch_done ...  ->  end_epoch) ...  ->  end, or fail  ->  report, of a test

The callbacks of frameworks are thin over this. What differs between them: where the parts are found, how a loop is
stopped, and whether it says that it failed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from harness.autologging import patcher
from harness.checkpoint.format.names import some
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.distributed.launch_identity import is_launcher_rank_zero
from harness.errors import HarnessError, Stopped
from harness.integrations.ended_run import EndedRun
from harness.io.standard_streams import write_error
from harness.models.model_spec import ExampleSource
from harness.training.periodic_logger import PeriodicLogger


@dataclass(frozen=True)
class CallbackOptions:
    """What a user says of the run; see `PeriodicLogger`.

    Args:
        every_n_epochs: a checkpoint each so many epochs; None: not by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: of the run's directory and the MLflow run; None: made up.
        run_dir: the directory that the runs' directories are in.
        checkpoint: everything else about checkpoints; None: as `CheckpointConfig` has it, but one that is due waits
            for the one before.
        tracking: everything else about tracking.
        params: parameters to log, beside those that the framework has.
        input_example: a batch of what the model takes, for its signature in MLflow.
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
    """How a framework's model is built again.

    Args:
        spec: its class, or a class that makes it.
        packages: what that needs.
        files: name -> text of what the framework itself reads beside the weights.
    """

    spec: ClassSpec
    packages: tuple[str, ...]
    files: Mapping[str, str]


class CallbackBase:
    """A `PeriodicLogger` in somebody else's loop.

    Effects: as `PeriodicLogger`: every event is collective, main thread. An error in one of them ends the run before
    it is raised on, but for `Stopped`, after which the loop may have something to save itself. While a run is open an
    exception that ends the process ends the run too.

    Args:
        options: what the user says.
    """

    # The one of this process that has a run.
    _open: ClassVar[CallbackBase | None] = None

    def __init__(self, options: CallbackOptions) -> None:
        self._options = options
        self._logger: PeriodicLogger | None = None
        # Rank zero's: the latest run, where it has ended well.
        self._ended: EndedRun | None = None
        self._has_said_none_is_open = False
        self._earlier_hook: Callable[..., Any] | None = None

    @property
    def logger(self) -> PeriodicLogger:
        """Of the run that is open."""
        assert self._logger is not None
        return self._logger

    @property
    def is_open(self) -> bool:
        """Whether a run is."""
        return self._logger is not None

    @property
    def options(self) -> CallbackOptions:
        """What the user says."""
        return self._options

    def begin(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scheduler: Any,
        *,
        completed: tuple[int, int],
        params: Mapping[str, Any],
        recipe: CallbackModelSpec | str,
        topology: Mapping[str, Any] | None = None,
    ) -> None:
        """Training begins, or goes on, in a run of its own or the one of that name; `harness.autolog` is off then.

        Args:
            accelerator: which ranks and which strategy.
            model: as it is trained: wrapped, sharded.
            optimizer: its own.
            scheduler: of the learning rate, where its state can be saved.
            completed: epochs and steps that are complete.
            params: what the framework knows of the configuration.
            recipe: how the model is built again; or why that is not known.
            topology: fields of `Topology` that the accelerator does not know.
        """
        CallbackBase.end_what_was_left()
        CallbackBase._open, self._ended = self, None
        # It would log the same training in a run of its own.
        patcher.turn_off(reports_unseen=False)
        options = self._options
        logger = self._logger = PeriodicLogger(
            accelerator,
            options.every_n_epochs,
            options.experiment_name,
            options.run_name,
            options.run_dir,
            # Who says how often gets so many, though epochs be shorter than a save.
            options.checkpoint or CheckpointConfig(when_busy="wait"),
            options.tracking,
            {**params, **(options.params or {})},
        )
        logger.topology = replace(logger.topology, **(topology or {}))
        self._hook()
        with self._ending():
            logger.start()
            if isinstance(recipe, CallbackModelSpec):
                logger.describe(recipe.spec, model, options.input_example, packages=recipe.packages, files=recipe.files)
            else:
                logger.say(recipe)
            logger.watch(model, optimizer, scheduler, completed=completed)

    @classmethod
    def end_what_was_left(cls) -> None:
        """A run that is open still has failed: in a notebook an error ends the training and not the process."""
        if cls._open is not None:
            cls._open.fail(HarnessError("training was abandoned: another one began in the same process"))

    def begin_epoch(self) -> None:
        """An epoch begins."""
        with self._ending():
            self.logger.events.begin_epoch()

    def batch_done(self, num_samples: int, *, is_loaders_last: bool, step: int) -> None:
        """See `Course.batch_done`."""
        with self._ending():
            self.logger.events.batch_done(num_samples, is_loaders_last=is_loaders_last, step=step)
        self.finish_copy()

    def report(self, values: Mapping[str, Any]) -> None:
        """Reduced values of now; see `PeriodicLogger.report`.

        Behind the end of training they are added to its run, and rank zero waits until MLflow has them. Where there is
        none, or it has failed, a line says once that they are in none.
        """
        if self._logger is None:
            self._report_after_end(values)
            return
        with self._ending():
            self.logger.report(values)

    def _report_after_end(self, values: Mapping[str, Any]) -> None:
        if self._ended is not None and values:
            self._ended.log(values)
        elif values and not self._has_said_none_is_open and _is_rank_zero():
            self._has_said_none_is_open = True
            names = some(sorted(map(str, values)), 4)
            write_error(f"harness: no training has begun, or it has failed, so {names} are in no run\n")

    def evaluated(self) -> None:
        """The loop has evaluated, which is no step's time."""
        if self._logger is not None:
            self._logger.events.restart_step_timer()

    def keep_rates(self) -> None:
        """The learning rates of now are the epoch's: what follows changes them for the next one."""
        if self._logger is not None:
            self._logger.events.freeze_learning_rates()

    def end_epoch(self, *, is_whole: bool = True, is_last: bool = False) -> None:
        """See `LoopEvents.end_epoch`."""
        with self._ending():
            self.logger.events.end_epoch(is_whole=is_whole, is_last=is_last)
        self.finish_copy()

    def finish_copy(self) -> None:
        """Block until the save in flight has copied everything: the framework and its callbacks may write weights."""
        if self._logger is not None:
            with self._ending():
                self.logger.events.finish_copy()

    def end(self) -> None:
        """Training is complete."""
        logger = self.logger
        with self._ending():
            logger.close()
        self._forget()
        if logger.topology.rank == 0 and logger.run_path is not None and logger.run_name is not None:
            self._ended = EndedRun(
                logger.run_path, logger.run_name, logger.tracking_config, logger.step, logger.progress.say
            )

    def fail(self, error: BaseException) -> BaseException:
        """Training ended by an error, or by `Stopped`; returns what really ended it. Nothing where no run is open."""
        if self._logger is None:
            return error
        logger = self._logger
        self._forget()
        return logger.fail(error)

    @contextmanager
    def _ending(self) -> Iterator[None]:
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            cause = self.fail(error)
            if cause is not error:
                raise cause from error
            raise

    # ------------------------------------------------- where the loop says nothing of its end

    def _hook(self) -> None:
        self._earlier_hook = sys.excepthook
        sys.excepthook = self._excepthook

    def _excepthook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        earlier = self._earlier_hook or sys.__excepthook__
        cause = self.fail(error)
        if cause is not error:
            # The echo of another rank's failure, which is what the user is to read last.
            cause.__cause__ = error
        earlier(type(cause), cause, cause.__traceback__)

    def _forget(self) -> None:
        self._logger = CallbackBase._open = None
        # Somebody else may have put theirs around ours: it stays then, and does nothing any more.
        if sys.excepthook == self._excepthook and self._earlier_hook is not None:
            sys.excepthook = self._earlier_hook


def _is_rank_zero() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return is_launcher_rank_zero()
