"""PeriodicLogger: metrics, checkpoints and the MLflow run of any Accelerate loop.

    with PeriodicLogger(accelerator, every_n_epochs=5, experiment_name="vit") as logger:
        logger.watch(model, optimizer)
        for epoch in logger.epochs(100):
            for batch in logger.batches(loader):
                loss = loss_of(model, batch)
                accelerator.backward(loss); optimizer.step(); optimizer.zero_grad()
                logger.log({"train/loss": loss}, weight=len(batch))

Every rank runs the same lines. The class combines these parts:

    RunSession           the run: directory, journal, signals, failures, end
    TrainingController   the events of the loop, and the actions due at each
    CheckpointScheduler  the checkpoints
    MetricAggregator     the metrics
    ResumeManager        the checkpoint that the run resumes from
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from harness.checkpoint.format.json_values import decode
from harness.checkpoint.restore.locate import longest_wait_s
from harness.checkpoint.restore.resume import GlobalBatch
from harness.checkpoint.state.trainer_state import AnyWatched, Watched
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.data.resumable_loader import ResumableLoader
from harness.distributed import strategies
from harness.distributed.broadcast import broadcast_buffers
from harness.distributed.collectives import Collectives
from harness.distributed.consensus import Consensus
from harness.distributed.topology import topology_of
from harness.errors import ConfigError
from harness.io.progress import Progress
from harness.metrics import step_timer
from harness.metrics.aggregator import MetricAggregator
from harness.metrics.reducer import Reducer
from harness.metrics.values import LoggedValues
from harness.models.model_spec import ExampleSource, check_spec
from harness.tracking import provenance
from harness.tracking.mlflow.given_run import GivenRun
from harness.tracking.mlflow.names import clean_path
from harness.training.checkpoint_scheduler import CheckpointScheduler
from harness.training.controller import TrainingController
from harness.training.own_loop import OwnLoop
from harness.training.rank_requests import RankRequests
from harness.training.registered_objects import RegisteredObjects
from harness.training.resume_manager import ResumeManager, ResumeOptions
from harness.training.run_session import FAILURE_WAIT_S, RunSession
from harness.training.state import TrainingContext, TrainingState
from harness.training.watched import StepCounter, modules_of, refuse_second_watch, watched_of

if TYPE_CHECKING:
    import torchmetrics


class PeriodicLogger:
    """Log metrics, save checkpoints and publish them to MLflow every n epochs, from every rank of a training loop.

    Effects: `start`, `watch`, `epochs`, `batches`, `eval_batches`, `save` and `close` are collective: every rank calls
    them alike, from the main thread. `log` and `update` are not, and never synchronize. Leaves
    ``<run_dir>/<run_name>/``.

    Args:
        accelerator: of the loop.
        every_n_epochs: epochs between two checkpoints; None disables the cadence by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: name of the run's directory and of the MLflow run; None generates one.
        run_dir: parent directory of the runs' directories.
        checkpoint: further options of checkpoints; `every_n_epochs` above replaces its own.
        tracking: further options of tracking; `experiment_name` above replaces its own.
        params: parameters to log; nested ones get dotted names.
        resume_from_checkpoint: ``auto``: if a run of this name exists, `watch` restores its newest checkpoint and
            `epochs` continues from there; ``never``: such a run is refused. Or the source of a new run: the directory
            of a checkpoint or of a run, or an address in MLflow (``runs:/...``, ``models:/...``).
        initial_weights: the weights of a new run: the directory of a checkpoint or of a Hugging Face model, or an
            address in MLflow.
        seeds_workers: make the random numbers in a loader's workers the same after a resume within an epoch; False:
            leave them unchanged.
        reset_scheduler: after a resume, step the newly constructed schedulers to the checkpoint's position; False:
            restore their state, including the arguments they had then.

    Attributes:
        latest: the latest reduced value of each metric; the same on every rank.
        run_name_prefix: first part of a generated run name; None: the experiment's name. Set before `start`.
        mlflow_run_id: id of the MLflow run on rank zero; None elsewhere. Set before `start` to use an existing MLflow
            run for a new run.
        given_run: the MLflow run that a new run uses, on rank zero; None: see `uses_given_run`. Set before `start`.
        uses_given_run: whether a new run uses the MLflow run that the user has named elsewhere, see
            `harness.tracking.mlflow.given_run`. Set before `start`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        every_n_epochs: int | None = 5,
        experiment_name: str | None = None,
        run_name: str | None = None,
        run_dir: str | Path = "runs",
        checkpoint: CheckpointConfig | None = None,
        tracking: TrackingConfig | None = None,
        params: Any = None,
        resume_from_checkpoint: str = "auto",
        initial_weights: str | None = None,
        seeds_workers: bool = True,
        reset_scheduler: bool = False,
    ) -> None:
        checkpoint = checkpoint or CheckpointConfig()
        tracking = tracking or TrackingConfig()
        self.accelerator = accelerator
        self.checkpoint_config = dataclasses.replace(checkpoint, every_n_epochs=every_n_epochs)
        self.tracking_config = dataclasses.replace(
            tracking, experiment_name=experiment_name or tracking.experiment_name
        )
        self.topology = topology_of(accelerator)
        self.progress = Progress(enabled=False)
        self.latest: dict[str, float] = {}
        self.run_name = run_name
        self.run_name_prefix: str | None = None
        self.mlflow_run_id: str | None = None
        self.given_run: GivenRun | None = None
        self.uses_given_run = True
        self.run_path: Path | None = None
        self._runs_dir = Path(run_dir)
        self._params = params
        self._resume_options = ResumeOptions(resume_from_checkpoint, initial_weights, reset_scheduler)
        self._is_open = False
        self._controller: TrainingController | None = None
        self._callbacks: list[Callable[[Mapping[str, float], int], None]] = []
        self._watched: AnyWatched | None = None
        self._state = TrainingState(ResumableLoader(accelerator, seeds_workers=seeds_workers))

    @property
    def step(self) -> int:
        """Complete optimizer steps."""
        return self._state.step

    @property
    def epoch(self) -> int:
        """Complete epochs."""
        return self._state.epoch

    # ---------------------------------------------------------------------- start and end

    def __enter__(self) -> PeriodicLogger:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        cause = self.fail(error)
        if cause is not error:
            # This rank's error is the consequence of another's: raise the cause.
            raise cause from error

    def start(self) -> None:
        """Create the run's directory and the MLflow run. Its id is on disk when this returns.

        Raises:
            HarnessError: on all ranks, if the directory or the store cannot be used.
            Stopped: on all ranks, if this launch stopped cleanly and its launcher has restarted it.
        """
        strategies.check_launch(self.accelerator)
        rank, world_size = self.topology.rank, self.topology.world_size
        options, checkpoint = self._resume_options, self.checkpoint_config
        # Longer than any wait for a checkpoint, so that an aborted save does not end the run; also longer than a
        # download, and than rank zero's wait for the tracking store at the start.
        longest_s = max(
            checkpoint.timeout_s,
            self.tracking_config.start_timeout_s,
            longest_wait_s(options.resume_from, options.initial_weights),
        )
        collectives = Collectives(rank, world_size, timeout_s=longest_s + 600)
        # A separate group: its reductions start when their copies are ready, which may be before another collective
        # on one rank and after it on another.
        reducer = Reducer(dist.new_group(backend="gloo") if world_size > 1 else None, step_timer.GAUGES)
        consensus = Consensus(dist.new_group(backend="gloo") if world_size > 1 else None)
        if self.mlflow_run_id is not None:
            self.given_run = GivenRun(self.mlflow_run_id, "the script")
        self._session = RunSession(
            self.topology, self.tracking_config, self.progress, checkpoint.monitor, checkpoint.mode
        )
        self._is_open = True
        try:
            directory = self._session.open(
                collectives,
                self.accelerator.device,
                self._runs_dir,
                self.run_name,
                self._params,
                resume=options.resume_from,
                run_name_prefix=self.run_name_prefix,
                given=self.given_run,
                uses_given_run=self.uses_given_run,
            )
            self.mlflow_run_id = self._session.mlflow_run_id
            self.run_name, self.run_path = directory.name, directory.path
            self._build(collectives, reducer, consensus, directory.path)
        except BaseException as error:
            raise self.fail(error) from None

    def _build(self, collectives: Collectives, reducer: Reducer, consensus: Consensus, run_path: Path) -> None:
        context = TrainingContext(
            self.accelerator,
            collectives,
            self._session,
            self.checkpoint_config,
            self.tracking_config,
            self.progress,
        )
        values = LoggedValues(context.warn)
        recorder = self._session.recorder
        self._metrics = MetricAggregator(self.accelerator.device, reducer, values, recorder, self.latest)
        self._registered = RegisteredObjects(context)
        self._checkpoints = CheckpointScheduler(context, run_path, self._state, self._metrics, self._registered)
        self._resume = ResumeManager(context, self._registered, run_path, self._resume_options)
        self._resume.find()
        requests = RankRequests(self._session, consensus)
        self._controller = TrainingController(
            context, self._state, self._metrics, self._checkpoints, self._resume, requests
        )
        self._controller.callbacks = self._callbacks
        self._loop = OwnLoop(self._controller)

    @property
    def events(self) -> TrainingController:
        """The controller, for loops that do not use `epochs` and `batches`; available after `start`."""
        assert self._controller is not None, "start() was not called"
        return self._controller

    @property
    def previous_batch(self) -> GlobalBatch | None:
        """The global batch of the run that is resumed; None for a new run, or if it is unknown."""
        return self._resume.previous_run.batch

    def previous_state(self, name: str) -> Any:
        """Return the resumed run's state that was registered under `name`; None without one."""
        state = self._resume.previous_run.states.get(name)
        return None if state is None else decode(state)

    def close(self) -> None:
        """Write and deliver all pending data, and end the run as FINISHED.

        Blocks for the write in flight, and then, on rank zero alone, for the delivery, at most
        ``tracking.drain_timeout_s``.

        Raises:
            HarnessError: on all ranks, if the last checkpoint could not be written, or no rank got any batch to train.
        """
        try:
            self.events.finish()
        except BaseException as error:
            raise self.fail(error) from error.__cause__
        self._release_loop()
        self._session.finish()

    def fail(self, error: BaseException) -> BaseException:
        """End the run because of an error: report it to the other ranks, and end the MLflow run.

        Returns the cause: another rank's failure, if this error is its consequence. Not collective: the other ranks may
        be anywhere.
        """
        if not self._is_open:
            return error
        self._is_open = False
        self._release_loop()
        cause = self._session.report_failure(error)
        if self._controller is not None:
            # Publish the last window if its reduction is complete. An error of a user's callback in here must not hide
            # the error that ended the run.
            with suppress(Exception):
                self._controller.collect_metrics_without_waiting()
        checkpoints: CheckpointScheduler | None = getattr(self, "_checkpoints", None)
        if checkpoints is not None:
            checkpoints.saver.abandon(FAILURE_WAIT_S)
        self._session.end_failed(cause)
        return cause

    def _release_loop(self) -> None:
        self._state.data.close()
        if self._controller is not None and self._controller.step_counter is not None:
            self._controller.step_counter.close()

    # ------------------------------------------------------------------------- the loop

    def watch(
        self,
        model: nn.Module | Mapping[str, Any],
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        *,
        steps_of: str | None = None,
        completed: tuple[int, int] | None = None,
    ) -> None:
        """Set the prepared model, optimizer and scheduler that checkpoints hold, or several of these by name.

        If the run is resumed, they hold the state of its newest checkpoint when this returns. Call it once::

            logger.watch(model, optimizer, scheduler)
            logger.watch({"generator": (g, opt_g), "discriminator": (d, opt_d)}, steps_of="generator")

        Several models are saved, restored and published together. The names of their tensors begin with the model's
        name (``generator.<name>``). With one process and DDP, an optimizer may hold parameters of several models. The
        logger counts the steps of one of the optimizers: a batch without a step of it counts none, a batch with two
        counts two.

        Args:
            model: prepared. Several: name -> model, or a tuple (model,), (model, optimizer), (model, optimizer,
                scheduler); a name is an identifier.
            optimizer: prepared.
            scheduler: prepared.
            steps_of: name of the model whose optimizer's steps are counted; None: the first one with an optimizer.
            completed: complete epochs and steps of a loop that has restored its state itself: nothing is restored, the
                MLflow run continues from there, and the run's existing checkpoints are kept.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved; if none of the run's checkpoints can be
                restored; if the loop starts at step 0 in a run that has checkpoints; if this was called before; or if
                an argument is not as described above.
        """
        if self._watched is not None:
            raise refuse_second_watch()
        watched = watched_of(model, optimizer, scheduler, steps_of)
        controller = self.events
        controller.watch(watched)
        self._watched = watched
        if completed is None:
            controller.resume(watched)
        else:
            controller.resume_at(*completed)
        if not isinstance(watched, Watched) and watched.counted is not None:
            # After the restore, which may have stepped the optimizer to create its state.
            controller.step_counter = StepCounter(watched.counted)
        self._session.recorder.describe_model(*modules_of(watched))

    def replace_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: Any = None) -> None:
        """Save the same model with another prepared optimizer from now on; with None, save the model alone.

        Effects: collective; main thread, between steps; waits for the save in flight.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved.
        """
        assert isinstance(self._watched, Watched)
        watched = Watched(self._watched.model, optimizer, scheduler)
        self.events.watch(watched)
        self._watched = watched
        # No need to wait for a step: the optimizer has stepped, or there is none.
        self._checkpoints.prepare()

    def restore_again(self) -> None:
        """Restore scheduler, learning rates and scalers of the run's checkpoint again.

        A script that repeats its complete epochs has changed them. Not collective; main thread.
        """
        if self._watched is not None:
            self._resume.restore_again(self._watched)

    def unwatch(self) -> None:
        """Stop taking checkpoints. Not collective, but every rank calls it alike; main thread."""
        self._checkpoints.unwatch()

    def describe(
        self,
        spec: ClassSpec,
        model: nn.Module,
        input_example: ExampleSource = None,
        dynamic_axes: Mapping[str, Sequence[int]] | None = None,
        *,
        packages: Sequence[str] = (),
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Describe how to build the models in MLflow, for `mlflow.pyfunc` and `mlflow models serve`.

        Effects: not collective, but every rank calls it alike; main thread, before `watch` and, with an example, before
        ``accelerator.prepare``. Rank zero runs the model on the example, in eval mode, and restores modes, random
        numbers and buffers. A model that fails on it has no signature, with a warning.

        Args:
            spec: the class of the model, or of a task whose `model` makes it, and its arguments; importable elsewhere.
            model: the model.
            input_example: a batch of the model's input, or a function that returns one: a tensor or array, or several
                by the names of the model's arguments. The first axis is that of the samples.
            dynamic_axes: name of an input (an unnamed one: ``input``) -> further axes that may have any size.
            packages: packages that the class needs besides its own.
            files: name -> text of further files beside the weights in MLflow.

        Raises:
            ConfigError: if the class cannot be imported elsewhere, an argument is not JSON, or the name of a file
                leads out of the model's directory.
        """
        check_spec("describe", spec)
        for name in files or {}:
            if clean_path(name) != name:
                raise ConfigError(
                    "describe.files",
                    f"{name!r} must be a path within the model's directory, without '%', '#', '?', ':' and '\\'; "
                    f"use {clean_path(name)!r}",
                )
        self._session.recorder.describe_recipe(spec, model, input_example, dynamic_axes, packages, files)

    def epochs(self, max_epochs: int, max_steps: int | None = None) -> Iterator[int]:
        """Iterate over epochs; after each, reduce the logged metrics and save if a checkpoint is due.

        Args:
            max_epochs: number of epochs in all.
            max_steps: optimizer steps after which `batches` ends, and then this iterator.

        Yields:
            The epoch's index, from 0.
        """
        return self._loop.epochs(max_epochs, max_steps)

    def batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared training loader, counting steps and logging between them.

        Args:
            loader: a loader returned by `accelerator.prepare`.
            limit: end after this many batches; None: all.

        Raises:
            PeerFailure: if another rank has failed.
            Stopped: if a signal asked any rank to stop.
            HarnessError: if two loaders are iterated over at the same time: a position to resume from is undefined.
        """
        return self._loop.batches(loader, limit)

    def eval_batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared evaluation loader, and reduce the values logged in it to one at its end.

        Each sample of the data set is on exactly one rank, whatever the number of ranks: samples that accelerate
        repeats to fill the last batch are removed, and `log` and `update` ignore a batch of only such samples.

        Args:
            loader: a loader returned by `accelerator.prepare`.
            limit: end after this many batches; None: all.
        """
        if self._watched is not None:
            for part in self._watched.parts:
                broadcast_buffers(part.model, self.topology.world_size)
        yield from self._loop.eval_batches(loader, limit)

    def on_reduced(self, callback: Callable[[Mapping[str, float], int], None]) -> None:
        """Call `callback` with each window's reduced values and its step, on every rank alike.

        It is called before a checkpoint of that window's steps is taken; it may raise.
        """
        self._callbacks.append(callback)

    def register(self, name: str, thing: Any, *, is_lenient: bool = False) -> None:
        """Save and restore the state of a further object.

        Effects: not collective; main thread, before the first `batches`. At each checkpoint the state is copied on rank
        0; after the first step all ranks compare theirs once.

        Args:
            name: unique among the registered objects.
            thing: with `state_dict`, of tensors, numbers, text, lists and dicts, the same on every rank, and
                `load_state_dict`, which is called here, or in `watch`, if the run is resumed.
            is_lenient: if the ranks' states differ, save rank 0's, with a warning; while the state cannot be saved,
                omit it from checkpoints, with a warning; and allow registration after the first `batches`, when a saved
                state is no longer loaded. False: all three are errors.

        Raises:
            CheckpointError: if its state cannot be saved, the name is used already, or training has begun. If the
                ranks' states differ, it is raised on all ranks after the first step.
        """
        self._registered.register(name, thing, is_lenient=is_lenient)

    def stop(self) -> None:
        """End training after this epoch's body. Every rank must decide alike, for example by `latest`."""
        self.events.request_stop()

    def save(self) -> bool:
        """Save now, whatever the cadence; return whether the save was started (see ``checkpoint.when_busy``).

        Within a batch of `batches` this returns True, and the save starts once that batch's optimizer step is counted,
        so that step and data position match the weights. The signal SIGUSR2 to any rank does the same on all of them.
        """
        if self._loop.is_in_batch:
            self.events.request_save()
            return True
        return self.events.save_now()

    def say(self, line: str) -> None:
        """Print a line for the user from rank zero."""
        if self.topology.rank == 0:
            self.progress.say(line)

    # ----------------------------------------------------------------------- logging

    def log(self, values: Mapping[str, Any], weight: float = 1.0) -> None:
        """Add the means of one batch, without a synchronization, reduction or transfer.

        The published value is the weighted mean over all values logged under the name, by any rank, since the last
        window. Uneven batches and ranks thus give the same result as one process.

        Args:
            values: name -> tensor of one element on any device, or number. Anything else, such as None or text, is left
                out, with one warning for each name.
            weight: number of items that the means are over.

        Raises:
            MetricError: if a tensor has more than one element or was changed after it was logged, or the weight is
                negative.
        """
        self._metrics.log(values, weight)

    def report(self, values: Mapping[str, Any]) -> None:
        """Log values that are reduced already, at the current step, without averaging.

        Values that are not numbers are left out, with one warning for each name.

        Effects: not collective, but every rank calls it alike; main thread; waits for a tensor that is on a device.
        """
        self._metrics.report(values, self.step)

    def record(self, values: Mapping[str, Any], step: Any = None) -> None:
        """Log values that a script has computed for all ranks, without a reduction.

        From then on the script owns such a name: values that this class would log under it are left out. The next
        checkpoint is linked to the values.

        Effects: not collective: only rank zero's values count, and other ranks need not call it.

        Args:
            values: name -> number, or array or tensor of one element. Anything else is left out, with one warning for
                each name.
            step: the script's own step or epoch, any number; fractions are truncated, with one warning. None, or with
                one warning a value that is not a 64-bit integer: the complete optimizer steps.
        """
        if self.topology.rank == 0:
            self._metrics.record(values, self.step, step)

    def update(self, metrics: Mapping[str, torchmetrics.Metric], *args: Any, **kwargs: Any) -> None:
        """Update torchmetrics objects with a batch of `eval_batches`, which computes them at its end.

        Args:
            metrics: name -> object, or collection of them; pass the same objects for each batch.
            *args: passed to ``update`` of each.
            **kwargs: passed to ``update`` of each.
        """
        self._metrics.update(metrics, args, kwargs)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log further parameters of the run, possibly nested. Not collective: only rank zero's count."""
        self._session.recorder.log_params(values)

    def describe_dataset(self, loader: Any, context: str = "train", batch: Any = None) -> None:
        """Record the data set of a loader that `batches` and `eval_batches` do not read as an input of the run.

        Effects: not collective: only rank zero's counts; reads no sample; waits once for the device that `batch` is on.

        Args:
            loader: of the data set.
            context: ``train`` or ``eval``.
            batch: the first batch of the loader, whose content is part of the digest; None: the digest is of the data
                set's class and length.
        """
        self._session.recorder.describe_dataset(loader, context, batch)

    def digest_of(self, batch: Any, context: str) -> provenance.BatchDigest | None:
        """Return the digest of a batch for `describe_dataset`, if the batch may change before that is called."""
        return self._session.recorder.digest_of(batch, context)

    @property
    def is_log_step_next(self) -> bool:
        """Whether metrics will be reduced at the end of the current optimizer step."""
        return self.events.is_log_step_next
