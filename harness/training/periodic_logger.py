"""PeriodicLogger: metrics, checkpoints and the MLflow run of anybody's Accelerate loop.

    with PeriodicLogger(accelerator, every_n_epochs=5, experiment_name="vit") as logger:
        logger.watch(model, optimizer)
        for epoch in logger.epochs(100):
            for batch in logger.batches(loader):
                loss = loss_of(model, batch)
                accelerator.backward(loss); optimizer.step(); optimizer.zero_grad()
                logger.log({"train/loss": loss}, weight=len(batch))

Every rank runs the same lines; what only rank zero does is hidden in here. The trainer of
`harness.training.fit` is one user of this class among others.
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

from harness.checkpoint.format.commit import Manifest
from harness.checkpoint.format.json_values import decode
from harness.checkpoint.restore.locate import longest_wait_s, remove_downloads
from harness.checkpoint.restore.resume import GlobalBatch
from harness.checkpoint.save.hooks import CheckpointHooks, RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.rank_state import RankState
from harness.checkpoint.state.trainer_state import AnyWatched, Watched
from harness.checkpoint.tools.retention import Retention
from harness.config.schema import CheckpointConfig, ClassSpec, TrackingConfig
from harness.data import rng_state
from harness.data.resumable_loader import ResumableLoader
from harness.distributed import strategies
from harness.distributed.broadcast import broadcast_buffers
from harness.distributed.collectives import Collectives
from harness.distributed.consensus import Consensus
from harness.errors import CheckpointError, ConfigError
from harness.io.progress import Progress
from harness.metrics import step_timer
from harness.metrics.aggregator import MetricAggregator
from harness.metrics.history import MetricHistory
from harness.metrics.learning_rates import LearningRates
from harness.metrics.reducer import Reducer
from harness.metrics.values import LoggedValues
from harness.models.model_spec import ExampleSource, check_spec
from harness.tracking import provenance
from harness.tracking.mlflow.given_run import GivenRun
from harness.tracking.mlflow.names import clean_path
from harness.training.checkpoint_scheduler import CheckpointScheduler
from harness.training.controller import TrainingController
from harness.training.loop_events import LoopEvents
from harness.training.own_loop import OwnLoop
from harness.training.place import TrainingPosition
from harness.training.resume_manager import ResumeManager
from harness.training.run_session import FAILURE_WAIT_S, RunSession
from harness.training.step_counter import StepCounter
from harness.training.watching import modules_of, refuse_second_watch, watched_of

if TYPE_CHECKING:
    import torchmetrics


class PeriodicLogger:
    """Logs, saves and publishes each so many epochs, from every rank's own loop.

    Effects: `start`, `watch`, `epochs`, `batches`, `eval_batches`, `save` and `close` are collective:
    every rank calls them alike, from the main thread. `log` and `update` are not, and never
    synchronise. Leaves ``<run_dir>/<run_name>/``.

    Args:
        accelerator: of the loop.
        every_n_epochs: a checkpoint each so many epochs; None: not by epochs.
        experiment_name: the MLflow experiment; None: that of ``MLFLOW_EXPERIMENT_ID``, which `mlflow.set_experiment`
            sets, or of ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
        run_name: of the run's directory and the MLflow run; None: made up.
        run_dir: the directory that the runs' directories are in.
        checkpoint: everything else about checkpoints; its `every_n_epochs` gives way to the one above.
        tracking: everything else about tracking; its `experiment_name` gives way to the one above.
        params: parameters to log, nested as you like: they become dotted names.
        resume_from_checkpoint: ``auto``: where a run of this name is there already, `watch` puts its newest
            checkpoint back, and `epochs` goes on from it; ``never``: it is refused. Or where a run begins: a
            checkpoint's directory, a run's, or an address in MLflow (``runs:/...``, ``models:/...``).
        initial_weights: what a run that begins takes its weights from: a checkpoint's directory, one as Hugging
            Face has it, or an address in MLflow.
        reset_scheduler: where the run goes on, schedulers are stepped from their start, as they are made now, to where
            the checkpoint was; False: they have the checkpoint's state, with what they were made with then.
        seeds_workers: have random numbers that a loader's workers draw be the same after a resume within an epoch;
            False: they are what they are without this class.

    Attributes:
        latest: the latest reduced value of each metric; the same on every rank.
        run_name_prefix: what a made-up name of the run begins with; None: the experiment's name. Set before `start`.
        mlflow_run_id: of the MLflow run; rank zero's, None elsewhere. Set before `start`: of one that is there already
            and is to be this one, where the run begins.
        given_run: the MLflow run that a run that begins is to be; rank zero's. None: see `uses_given_run`. Set before
            `start`.
        uses_given_run: whether a run that begins is the MLflow run that the user has named elsewhere, see
            `harness.tracking.mlflow.given_run`. Set before `start`.
        events: by which a loop that is not `epochs`'s and `batches`'s says what happens in it; from `start` on.
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
        self.topology = strategies.describe(accelerator)
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
        self._resume_from = resume_from_checkpoint
        self._initial_weights = initial_weights
        self._reset_scheduler = reset_scheduler
        self._started = False
        self._callbacks: list[Callable[[Mapping[str, float], int], None]] = []
        self._watched: AnyWatched | None = None
        self._step_counter: StepCounter | None = None
        self._rates = LearningRates()
        self._values = LoggedValues(lambda line: self.say(f"harness: warning: {line}"))
        self._place = TrainingPosition()
        self._batches = ResumableLoader(accelerator, seeds_workers=seeds_workers)

    @property
    def step(self) -> int:
        """Optimizer steps that are complete."""
        return self._place.step

    @property
    def epoch(self) -> int:
        """Epochs that are complete."""
        return self._place.epoch

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
            # This rank's error is the echo of another's: what the user reads is the cause.
            raise cause from error

    def start(self) -> None:
        """Make the run's directory and the MLflow run; its id is on disk when this returns.

        Raises:
            HarnessError: on all ranks, if the directory or the store cannot be used.
        """
        strategies.check_launch(self.accelerator)
        rank, world_size = self.topology.rank, self.topology.world_size
        # Longer than any wait of a checkpoint's, so that a save that is given up ends no run; or of a download's, or of
        # rank zero's for the tracking store at the start.
        longest_s = max(
            self.checkpoint_config.timeout_s,
            self.tracking_config.start_timeout_s,
            longest_wait_s(self._resume_from, self._initial_weights),
        )
        self._collectives = Collectives(rank, world_size, timeout_s=longest_s + 600)
        # A group of its own: its reductions are started when their copies are ready, which may be
        # before a collective call on one rank and after it on another.
        group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._windows = MetricAggregator(
            self.accelerator.device, Reducer(group, step_timer.GAUGES), self._rates.now, self._told, self._values
        )
        votes = Consensus(dist.new_group(backend="gloo") if world_size > 1 else None)
        ranking = (self.checkpoint_config.monitor, self.checkpoint_config.mode)
        if self.mlflow_run_id is not None:
            self.given_run = GivenRun(self.mlflow_run_id, "the script")
        self._run = RunSession(self.topology, self.tracking_config, self.progress, *ranking)
        self._started = True
        try:
            directory = self._run.open(
                self._collectives,
                self.accelerator.device,
                self._runs_dir,
                self.run_name,
                self._params,
                resume=self._resume_from,
                stem=self.run_name_prefix,
                given=self.given_run,
                uses_given_run=self.uses_given_run,
            )
            self.mlflow_run_id = self._run.mlflow_run_id
            self.run_name, self.run_path = directory.name, directory.path
            self._build(directory.path, votes)
        except BaseException as error:
            raise self.fail(error) from None

    def _build(self, run_path: Path, votes: Consensus) -> None:
        """All that a run's directory is needed for, each part from those before it."""
        self._saver = Saver(
            self.accelerator,
            self._collectives,
            self.checkpoint_config,
            run_path / "checkpoints",
            RunFacts(self.topology.run_facts, provenance.versions()),
            _SaveHooks(self, self._run, run_path),
        )
        self._resumption = ResumeManager(
            self.accelerator,
            self._collectives,
            run_path,
            self._resume_from,
            self._initial_weights,
            self.tracking_config.tracking_uri,
            self._reset_scheduler,
            self.say,
        )
        self._resumption.find()
        history = self._history = MetricHistory(self.latest, self._run.log_metrics, self._run.log_recorded)
        self._saves = CheckpointScheduler(
            self.accelerator,
            self._saver,
            self._place,
            self._batches,
            self._windows,
            history,
            self._resumption.states,
            (lambda: None) if self.checkpoint_config.save_weights_only else self._resumption.require_alike,
            self._run.keep_points,
            self.say,
        )
        self._course = TrainingController(
            self.accelerator,
            self.checkpoint_config,
            self.tracking_config,
            self._place,
            self._batches,
            self._run,
            self._windows,
            history,
            self._saves,
            votes,
            self.progress,
            self.say,
        )
        self.events = LoopEvents(
            self.accelerator, self._place, self._batches, self._resumption, self._course, self._windows, self._rates
        )
        self._loop = OwnLoop(
            self.accelerator,
            self._collectives,
            self._run,
            self._place,
            self._batches,
            self._windows,
            self._resumption,
            self._saves,
            self._course,
            self.events,
            self.progress,
        )

    @property
    def previous_batch(self) -> GlobalBatch | None:
        """What an optimizer step took of the run that goes on; None: it begins, or that is not known."""
        return self._resumption.before.batch

    def previous_state(self, name: str) -> Any:
        """The state under that name (`register`) of the run that goes on, before it is put back; None: it has none."""
        state = self._resumption.before.states.get(name)
        return None if state is None else decode(state)

    def close(self) -> None:
        """Write and deliver what is still on its way; the run is FINISHED.

        Blocks for the write in flight, and then, on rank zero alone, for the delivery, at most
        ``tracking.drain_timeout_s``.

        Raises:
            HarnessError: on all ranks, if the last checkpoint could not be written, or no rank got any batch to train.
        """
        try:
            self._course.synchronize()
            self._windows.collect()
            self._windows.flush(self.step, wait=True)
            self._course.read_votes()
            self.events.require_batches(self._collectives)
            self._saver.close()
        except BaseException as error:
            raise self.fail(error) from error.__cause__
        self._stop_counting()
        self._run.finish()

    def fail(self, error: BaseException) -> BaseException:
        """End the run because of an error: the other ranks are told, and MLflow shows how it ended.

        Not collective: the other ranks may be anywhere.

        Returns:
            What really ended the run: another rank's failure, where this error is only its echo.
        """
        if not self._started:
            return error
        self._started = False
        self._stop_counting()
        saver = getattr(self, "_saver", None)

        def before_end() -> None:
            if saver is not None:
                # The values of the last step that is complete, where its reduction is; whatever a callback of the
                # user's makes of them, it is not what has ended the run.
                with suppress(Exception):
                    self._windows.collect_what_is_there()
                saver.abandon(FAILURE_WAIT_S)

        return self._run.fail(error, before_end)

    def _stop_counting(self) -> None:
        self._batches.close()
        if self._step_counter is not None:
            self._step_counter.close()

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
        """Set what checkpoints hold: the prepared model, optimizer and scheduler, or several of these by name.

        If the run is resumed, they hold the state of its newest checkpoint when this returns. It is called once::

            logger.watch(model, optimizer, scheduler)
            logger.watch({"generator": (g, opt_g), "discriminator": (d, opt_d)}, steps_of="generator")

        Several models are saved, restored and published together. The names of their tensors begin with the name of
        the model (``generator.<name>``). With one process and DDP, an optimizer may hold parameters of several models.
        The logger's step counts the steps that one of the optimizers makes: a batch without a step of it counts none,
        a batch with two counts two.

        Args:
            model: prepared. Several: name -> model, or a tuple (model,), (model, optimizer), (model, optimizer,
                scheduler); a name is an identifier.
            optimizer: prepared.
            scheduler: prepared.
            steps_of: name of the model whose optimizer's steps are counted; None: the first one with an optimizer.
            completed: epochs and steps that are complete, where the loop has put its state back by itself: nothing
                else is put back, the MLflow run goes on from there, and checkpoints that the run has already stay.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved, or none of the run's checkpoints
                can be put back; or the loop begins anew in a run that has checkpoints; or this was called before; or
                an argument is not as described above.
        """
        if self._watched is not None:
            raise refuse_second_watch()
        watched = watched_of(model, optimizer, scheduler, steps_of)
        self._saver.check(watched)
        self._watched = watched
        self._rates.optimizers = _optimizers(watched)
        self._course.restart_step_timer()
        self._saves.watches()
        if completed is None:
            self._resume(watched)
        else:
            self._go_on_at(*completed)
        if not isinstance(watched, Watched) and watched.counted is not None:
            # Only now: a restore may have stepped the optimizer to make its state.
            self._step_counter = self._course.step_counter = StepCounter(watched.counted)
        self._run.describe_model(*modules_of(watched))

    def replace_optimizer(self, optimizer: torch.optim.Optimizer | None, scheduler: Any = None) -> None:
        """Have checkpoints be of the same model and another optimizer from here on: the loop has made one.

        Effects: collective; main thread, between steps; waits for a save that is being written.

        Args:
            optimizer: prepared; None: checkpoints are of the model alone.
            scheduler: of the optimizer.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved.
        """
        assert isinstance(self._watched, Watched)
        watched = Watched(self._watched.model, optimizer, scheduler)
        self._saver.check(watched)
        self._watched = watched
        self._rates.optimizers = _optimizers(watched)
        self._course.restart_step_timer()
        self._saves.watches()
        # It has stepped, or there is none to wait for.
        self._saves.prepare()

    def restore_again(self) -> None:
        """Put scheduler, learning rates and scalers back once more, as the run's checkpoint has them.

        Where a script's epochs that are done went by again, it has moved them. Not collective; main thread.
        """
        if self._watched is not None:
            self._resumption.put_back_again(self._watched)

    def unwatch(self) -> None:
        """No checkpoint is taken from here on. Not collective, but every rank calls it alike; main thread."""
        self._saves.watches_no_longer()

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
        """Say how the models in MLflow are built again, so that `mlflow.pyfunc` and `mlflow models serve` can.

        Effects: not collective, but every rank calls it alike; main thread, before `watch` and, with an example, before
        ``accelerator.prepare``. Rank zero runs the model on the example, in eval mode; modes, random numbers and
        buffers are as before when this returns. A model that fails on it has no signature, and a line says so.

        Args:
            spec: the class of the model, or of a task whose `model` makes it, and its arguments; importable elsewhere.
            model: the model.
            input_example: a batch of what the model takes, or a function that gives it: a tensor or array, or several
                by the names of its arguments. The first axis is that of the samples.
            dynamic_axes: name of an input (one without a name: ``input``) -> further axes that may have any size.
            packages: what the class needs beside the package that it is in.
            files: name -> text of what else is to lie beside the weights in MLflow.

        Raises:
            ConfigError: if the class cannot be imported elsewhere, an argument is no JSON, or the name of a file leads
                out of the model's directory.
        """
        check_spec("describe", spec)
        for name in files or {}:
            if clean_path(name) != name:
                raise ConfigError(
                    "describe.files",
                    f"{name!r} must be a path within the model's directory, without '%', '#', '?', ':' and '\\'; "
                    f"use {clean_path(name)!r}",
                )
        self._run.describe_recipe(spec, model, input_example, dynamic_axes, packages, files)

    def epochs(self, max_epochs: int, max_steps: int | None = None) -> Iterator[int]:
        """Count epochs; after each, reduce what was logged and save if a checkpoint is due.

        Args:
            max_epochs: number of epochs in all.
            max_steps: optimizer steps after which `batches` ends, and this after it.

        Yields:
            The epoch's index, from 0.
        """
        return self._loop.over_epochs(max_epochs, max_steps)

    def batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared training loader, counting steps and logging between them.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            limit: end after so many batches; None: all.

        Raises:
            PeerFailure: if another rank has failed.
            Stopped: if a signal asked any rank to stop.
            HarnessError: if two loaders are iterated over at the same time: where such a run goes on cannot be told.
        """
        return self._loop.over_batches(loader, limit)

    def eval_batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared evaluation loader; what is logged meanwhile is one value at its end.

        Each sample of the data set is on exactly one rank, whatever the number of ranks: samples that
        accelerate repeats to fill the last batch are cut off, and `log` and `update` take nothing from a
        batch that has only such ones.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            limit: end after so many batches; None: all.
        """
        if self._watched is not None:
            for part in self._watched.parts:
                broadcast_buffers(part.model, self.topology.world_size)
        yield from self._loop.over_evaluation(loader, limit)

    def on_reduced(self, callback: Callable[[Mapping[str, float], int], None]) -> None:
        """Have `callback` called with each window's reduced values and its step, on every rank alike.

        It is called before a checkpoint is taken that would hold that window's steps; it may raise.
        """
        self._callbacks.append(callback)

    def register(self, name: str, thing: Any, *, is_lenient: bool = False) -> None:
        """Have checkpoints hold the state of something else that goes on where it was.

        Effects: not collective; main thread, before the first `batches`. At each checkpoint the state is copied on
        rank 0; after the first step all ranks compare theirs once.

        Args:
            name: of its own.
            thing: with `state_dict`, of tensors, numbers, text, lists and dicts, the same on every rank, and
                `load_state_dict`, which is called here, or in `watch`, if the run goes on.
            is_lenient: where the ranks' states differ, rank 0's is saved, with a line; where its state can no longer be
                saved, checkpoints are without it, with a line; and it may be registered after the first `batches`, when
                a saved state is no longer loaded. False: all three are errors.

        Raises:
            CheckpointError: if its state cannot be saved, the name is taken, or training has begun. Where the ranks'
                states differ, it is raised on all ranks after the first step.
        """
        self._resumption.register(name, thing, is_lenient=is_lenient)

    def stop(self) -> None:
        """End training after this epoch's body. Every rank must decide alike, as from `latest`."""
        self._course.ends = self._place.is_stopped = True

    def save(self) -> bool:
        """Save now, whatever the cadence; whether it was begun (see ``checkpoint.when_busy``).

        Within a batch of `batches` it is done when that batch's optimizer step is counted, so that step and
        data position are those of the weights: true then.

        From outside, the signal SIGUSR2 at any one rank does the same on all of them.
        """
        if self._course.is_in_batch:
            self._course.ask_for_save()
            return True
        self._course.synchronize()
        # What this returns may be branched on: it is the same on every rank.
        has_begun = self._saves.save_with_metrics(self._place.step_name) and self._saves.settle()
        # Other than behind a batch, what follows need not be a step.
        self._course.finish_copy()
        return has_begun

    def say(self, line: str) -> None:
        """A line for the user, from rank zero, of what all ranks know."""
        if self.topology.rank == 0:
            self.progress.say(line)

    # ----------------------------------------------------------------------- logging

    def log(self, values: Mapping[str, Any], weight: float = 1.0) -> None:
        """Take the means of one batch. Nothing is synchronised, reduced or sent here.

        The value that is published is the mean over all that was logged under the name, by any rank,
        since the last time: weighted, so that uneven batches and ranks give what one process would.

        Args:
            values: name -> tensor of one element on any device, or number. Anything else, such as None or text, is left
                out, and a line says so once for each name.
            weight: how many items the means are over.

        Raises:
            MetricError: if a tensor has more than one element, or was changed after it was logged.
        """
        self._windows.log(values, weight)

    def report(self, values: Mapping[str, Any]) -> None:
        """Take values that are reduced already, as of the steps that are complete: nothing is averaged.

        What is no number is left out, and a line says so once for each name.

        Effects: not collective, but every rank calls it alike; main thread; waits for a tensor that is on a device.
        """
        self._history.add(self._values.numbers(values), self.step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Further parameters of the run, nested as you like. Not collective: rank zero's count."""
        self._run.log_params(values)

    def describe_dataset(self, loader: Any, context: str = "train", batch: Any = None) -> None:
        """Record the data set of a loader that is not `batches`'s or `eval_batches`'s as an input of the run.

        Effects: not collective: rank zero's counts; no sample is read; waits once for the device that `batch` is on.

        Args:
            loader: whose data set it is.
            context: ``train`` or ``eval``.
            batch: the first batch of the loader, whose content goes into the digest; None: the digest is of the data
                set's class and length.
        """
        self._run.describe_dataset(loader, context, batch)

    def digest_of(self, batch: Any, context: str) -> provenance.BatchDigest | None:
        """What `describe_dataset` needs of a batch that may be gone by then; see `RunSession.digest_of`."""
        return self._run.digest_of(batch, context)

    def update(self, metrics: Mapping[str, torchmetrics.Metric], *args: Any, **kwargs: Any) -> None:
        """Update torchmetrics objects with a batch of `eval_batches`; they are computed at its end.

        Args:
            metrics: name -> object, or collection of them; give the same objects for each batch.
            args: passed to ``update`` of each.
            kwargs: likewise.
        """
        self._windows.update(metrics, args, kwargs)

    def record(self, values: Mapping[str, Any], step: Any = None) -> None:
        """Log values that are whole already, as a loop of somebody else's has made them: nothing is reduced.

        A name that comes this way is the loop's from then on: what this class would log under it is left out. The
        next checkpoint is linked to the values.

        Effects: not collective: rank zero's values count, and other ranks may call it or not; any step may be given,
            since the loop may count epochs.

        Args:
            values: name -> number, or array or tensor of one element. Anything else is left out, and a line says so
                once for each name.
            step: of the loop's own counting; None: the optimizer steps that are complete. So it is where the step is
                no integer of 64 bits; fractions are cut off. A line says so once.
        """
        if self.topology.rank == 0 and (numbers := self._values.numbers(values)):
            self._history.record(numbers, self.step, self._values.step(step))

    @property
    def is_log_step_next(self) -> bool:
        """Whether metrics will be reduced at the end of the optimizer step that is running."""
        return self._course.is_log_step_next

    def _told(self, values: Mapping[str, float], step: int) -> None:
        """A window is reduced: on all ranks alike."""
        if "perf/step_time_p50_s" in values:
            self._course.pace(values["perf/step_time_p50_s"])
        self._history.add(values, step)
        self._report_save(step)
        for callback in self._callbacks:
            callback(values, step)

    def _report_save(self, step: int) -> None:
        """What the last save has cost, and what went wrong with it, in the run: rank zero's."""
        costs, failure = self._saver.pop_report()
        if costs:
            self._run.log_save(costs, step)
        if failure is not None:
            self.say(f"harness: warning: {failure}")

    # ------------------------------------------------------------------- checkpoints

    def _rank_state(self) -> RankState:
        """This rank's own part of a checkpoint of now."""
        # Within an evaluation nothing of it is kept: it begins anew, with the same random numbers.
        now = self._course.random_to_keep or rng_state.capture(self.accelerator.device)
        return RankState(now, self._batches.state, self._windows.partial())

    def _go_on_at(self, epoch: int, step: int) -> None:
        there = self._resumption.leave()
        if there and not step:
            raise CheckpointError(
                f"{self.run_path}: has checkpoints already ({', '.join(sorted(there)[-3:])}), and training begins at "
                "step 0; have the loop resume from its own checkpoint, or give another run_name"
            )
        self._place.epoch, self._place.step = epoch, step
        self._saves.kept = there
        if step:
            self._run.resumed(step, None)
            self.say(f"goes on: {_counted(epoch, step)}")

    def _resume(self, watched: AnyWatched) -> None:
        resumed = self._resumption.put_back(watched)
        if resumed is None:
            return
        state = resumed.state
        self._place.epoch, self._place.step = state.epoch, state.step
        self._place.samples_per_batch, self._place.is_stopped = state.samples_per_batch, state.is_stopped
        self._batches.restore(resumed.data, state.loaders_done, state.batches_in_epoch)
        self._saves.is_saved()
        self._windows.put_back(resumed.sums)
        self.events.rng_state_to_restore = None if resumed.rank_state is None else resumed.rank_state.random
        self.latest.update(state.metrics)
        self._run.resumed(state.step, resumed.name)
        self.say(f"goes on from {resumed.name}: {_counted(state.epoch, state.step)}")


def _optimizers(watched: AnyWatched) -> dict[str, torch.optim.Optimizer]:
    return {part.name: part.optimizer for part in watched.parts if part.optimizer is not None}


def _counted(epoch: int, step: int) -> str:
    return f"{epoch} epoch{'' if epoch == 1 else 's'} and {step} step{'' if step == 1 else 's'} are done"


class _SaveHooks(CheckpointHooks):
    """Connects the saver with the run: rank states for it, and from it entries of the journal and retention."""

    def __init__(self, logger: PeriodicLogger, run: RunSession, run_path: Path) -> None:
        self._logger = logger
        self._run = run
        self._downloads_dir = run_path / "downloads"
        self._retention = Retention(run_path / "checkpoints", logger.checkpoint_config, self, logger.progress.say)

    def capture_rank_state(self) -> RankState:
        return self._logger._rank_state()

    def on_checkpoint_committing(self) -> None:
        self._run.sync()

    def on_checkpoint_committed(self, name: str, manifest: Manifest) -> None:
        self._run.publish(name, manifest)
        remove_downloads(self._downloads_dir)
        # After its publication: in MLflow too nothing is removed before its replacement is there.
        self._retention.apply(name)

    def on_checkpoint_retired(self, name: str, key: str) -> None:
        self._run.retire(name, key)
