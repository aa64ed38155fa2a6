"""PeriodicLogger: metrics, checkpoints and the MLflow run of anybody's Accelerate loop.

    with PeriodicLogger(accelerator, every_n_epochs=5, experiment_name="vit") as logger:
        logger.watch(model, optimizer)
        for epoch in logger.epochs(100):
            for batch in logger.batches(loader):
                loss = loss_of(model, batch)
                accelerator.backward(loss); optimizer.step(); optimizer.zero_grad()
                logger.log({"train/loss": loss}, weight=len(batch))

Every rank runs the same lines; what only rank zero does is hidden in here. The trainer of
`harness.loop` is one user of this class among others.
"""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from harness import data, random_state, runtime, timing
from harness.agreement import Agreement
from harness.batches import Continuation, TrainingBatches
from harness.buffers import take_rank_zero_buffers
from harness.checkpoint.commit import Manifest
from harness.checkpoint.json_values import decode, encode
from harness.checkpoint.locate import Found, find_checkpoints, locate, locate_weights, longest_wait_s, remove_downloads
from harness.checkpoint.names import unwrapped
from harness.checkpoint.rank_state import RankState
from harness.checkpoint.restore import restore_weights
from harness.checkpoint.resume import Resumed, resume, samples_per_step
from harness.checkpoint.retention import Retention
from harness.checkpoint.saver import Saver
from harness.checkpoint.trainer_state import Moment, Watched
from harness.config import CheckpointConfig, TrackingConfig
from harness.errors import CheckpointError, Stopped
from harness.metric_objects import compute_over_ranks, each_metric
from harness.metrics import Reducer, WeightedSums
from harness.progress import Progress
from harness.run_lifetime import FAILURE_WAIT_S, RunLifetime
from harness.schedule import Cadence
from harness.tracking import provenance
from harness.votes import Votes

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
        experiment_name: the MLflow experiment; None: ``MLFLOW_EXPERIMENT_NAME``, else ``default``.
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

    Attributes:
        step: optimizer steps that are complete.
        epoch: epochs that are complete.
        latest: the latest reduced value of each metric; the same on every rank.
        samples_per_step_before: of all ranks together, of the run that goes on; None: it begins, or is not known.
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
    ) -> None:
        checkpoint = checkpoint or CheckpointConfig()
        tracking = tracking or TrackingConfig()
        self.accelerator = accelerator
        self.checkpoint_config = dataclasses.replace(checkpoint, every_n_epochs=every_n_epochs)
        self.tracking_config = dataclasses.replace(
            tracking, experiment_name=experiment_name or tracking.experiment_name
        )
        self.topology = runtime.describe(accelerator)
        self.progress = Progress(enabled=False)
        self.step = 0
        self.epoch = 0
        self.latest: dict[str, float] = {}
        self.run_name = run_name
        self.run_path: Path | None = None
        self._runs_dir = Path(run_dir)
        self._params = params
        self._resume_from = resume_from_checkpoint
        self._initial_weights = initial_weights
        self._cadence = Cadence(self.checkpoint_config.every_n_epochs, self.checkpoint_config.every_n_steps)
        self._train_sums = WeightedSums()
        self._eval_sums = WeightedSums()
        self._metric_objects: dict[str, torchmetrics.Metric] = {}
        self._timer = timing.StepTimer()
        # What log() adds to: training's sums, evaluation's, or nothing (a batch that does not count).
        self._logging_to: WeightedSums | None = self._train_sums
        self._watched: Watched | None = None
        self._prepares = False
        self._max_steps: int | None = None
        self._ends = False
        self._saved_at_step: int | None = None
        self._flushed_at_step: int | None = None
        self._is_save_open = False
        self._batches = TrainingBatches(accelerator)
        self._batches_in_epoch = 0
        self._samples_per_batch: int | None = None
        self._found: Found | None = None
        self.samples_per_step_before: int | None = None
        self._resumed: Resumed | None = None
        # Random numbers as they were when the evaluation that is running began.
        self._random_before_eval: dict[str, Any] | None = None
        self._registered: dict[str, Any] = {}
        self._is_stopped = False
        self._is_cut_short = False
        self._save_is_asked = False
        self._is_in_batch = False
        self._samples_in_step = 0
        self._started = False
        self._callbacks: list[Callable[[Mapping[str, float], int], None]] = []
        self._window_rates: dict[str, float] = {}

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
        runtime.check_launch(self.accelerator)
        rank, world_size = self.topology.rank, self.topology.world_size
        # Longer than any wait of a checkpoint's, so that a save that is given up ends no run; or of a download's.
        longest_s = max(self.checkpoint_config.timeout_s, longest_wait_s(self._resume_from, self._initial_weights))
        self._agreement = Agreement(rank, world_size, timeout_s=longest_s + 600)
        # A group of its own: its reductions are started when their copies are ready, which may be
        # before a call of the agreement's on one rank and after it on another.
        group = dist.new_group(backend="gloo") if world_size > 1 else None
        self._reducer = Reducer(group, timing.GAUGES)
        self._votes = Votes(dist.new_group(backend="gloo") if world_size > 1 else None)
        self._run = RunLifetime(self.topology, self.tracking_config, self.progress)
        self._started = True
        try:
            directory = self._run.open(
                self._agreement, self._runs_dir, self.run_name, self._params, resume=self._resume_from
            )
            self.run_name, self.run_path = directory.name, directory.path
            retention = Retention(
                self.run_path / "checkpoints", self.checkpoint_config, self._run.retire, self.progress.say
            )

            def committed(name: str, manifest: Manifest) -> None:
                self._run.publish(name, manifest)
                remove_downloads(directory.path / "downloads")
                # Behind its publication: in MLflow too nothing goes before what takes its place is there.
                retention.apply(name)

            self._saver = Saver(
                self.accelerator,
                self._agreement,
                self.checkpoint_config,
                self.run_path / "checkpoints",
                self.topology.run_facts,
                provenance.versions(),
                committed,
                self._take_rank_state,
            )
            self._found, self.samples_per_step_before = self._agreement.from_rank_zero(
                "find the checkpoints", self._find_checkpoints
            )
        except BaseException as error:
            raise self.fail(error) from None

    def close(self) -> None:
        """Write and deliver what is still on its way; the run is FINISHED.

        Blocks for the write in flight, and then, on rank zero alone, for the delivery, at most
        ``tracking.drain_timeout_s``.

        Raises:
            HarnessError: on all ranks, if the last checkpoint could not be written.
        """
        try:
            self._collect()
            self._flush_train(wait=True)
            self._votes.read()
            self._saver.close()
        except BaseException as error:
            raise self.fail(error) from error.__cause__
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
        saver = getattr(self, "_saver", None)
        return self._run.fail(error, before_end=lambda: None if saver is None else saver.abandon(FAILURE_WAIT_S))

    # ------------------------------------------------------------------------- the loop

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, scheduler: Any = None) -> None:
        """Say what checkpoints are of: the prepared model, optimizer and scheduler.

        Where the run goes on, they hold what its newest checkpoint holds when this returns.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved, or none of the run's checkpoints
                can be put back.
        """
        watched = Watched(model, optimizer, scheduler)
        self._saver.check(watched)
        self._watched = watched
        self._resume(watched)
        # Memory for saving is made once the optimizer has a state: after its first step.
        self._prepares = True
        self._run.describe_model(unwrapped(model))

    def epochs(self, max_epochs: int, max_steps: int | None = None) -> Iterator[int]:
        """Count epochs; after each, reduce what was logged and save if a checkpoint is due.

        Args:
            max_epochs: number of epochs in all.
            max_steps: optimizer steps after which `batches` ends, and this after it.

        Yields:
            The epoch's index, from 0.
        """
        self._max_steps = max_steps
        if self._is_stopped or (max_steps is not None and self.step >= max_steps):
            # A run that was complete goes on: there is nothing left to do.
            return
        if self._resumed is not None and self._resumed.rank_state is not None:
            random_state.put_back(self._resumed.rank_state.random, self.accelerator.device)
        for epoch in range(self.epoch, max_epochs):
            self._is_cut_short = False
            yield epoch
            is_whole = not self._is_cut_short
            if is_whole:
                self.epoch, self._batches_in_epoch = epoch + 1, 0
                self._batches.end()
            is_last = self.epoch == max_epochs or self._ends
            epoch_save_is_due = is_whole and self._cadence.is_due_after_epoch(self.epoch)
            step_save_is_due = is_whole and self._cadence.is_due_after_step(self.step)
            saves = epoch_save_is_due or step_save_is_due or (is_last and self.checkpoint_config.save_last)
            self._collect()
            # A checkpoint carries the metrics of its moment; otherwise nobody waits for them here.
            self._flush_train(wait=saves or is_last)
            if is_whole:
                self._emit({"epoch": float(self.epoch)}, self.step)
            if saves:
                by_epoch = epoch_save_is_due or (is_whole and not step_save_is_due)
                name = f"epoch-{self.epoch:04d}" if by_epoch else f"step-{self.step:08d}"
                # The last one is what the training was for: it is not skipped because the disk is busy.
                self._save(name, must=is_last)
            self.progress.epoch_done(epoch + 1, self.step, self.latest, self._saver.status)
            if is_last:
                return

    def batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared training loader, counting steps and logging between them.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            limit: end after so many batches; None: all.

        Raises:
            PeerFailure: if another rank has failed.
            Stopped: if a signal asked this rank to stop.
        """
        data.check_size(loader, self.topology.world_size, "training")
        self._run.describe_dataset(loader, "train")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.epoch)
        self.progress.epoch_begins(self.epoch, _length(loader, limit))
        self._timer.resume()
        continuation = self._take_continuation(loader)
        num_taken = self._batches_in_epoch = 0 if continuation is None else continuation.num_taken
        loader, iterator = self._batches.begin(loader, continuation)
        try:
            if continuation is not None and limit is not None and num_taken >= limit:
                # All that will be taken is done. What the loader draws as an epoch begins is drawn all the same.
                next(iterator, None)
                random_state.put_back(continuation.random, self.accelerator.device)
                return
            for position, batch in enumerate(iterator, start=num_taken + 1):
                if position == limit:
                    # The last one that will be taken: an accumulation that is open must end with it.
                    loader.end_of_dataloader = True
                self._is_in_batch = True
                yield batch
                self._is_in_batch = False
                is_epochs_last = position == limit or getattr(loader, "end_of_dataloader", False)
                self._after_batch(batch, is_epochs_last)
                if self._ends:
                    self._is_cut_short = not is_epochs_last
                if position == limit or self._ends:
                    return
        finally:
            self._is_in_batch = False
            _leave(loader, iterator)

    def _after_batch(self, batch: Any, is_epochs_last: bool) -> None:
        self._batches_in_epoch += 1
        self._samples_in_step += data.batch_size(batch)
        self._run.check()
        # A step that fp16's overflow has skipped has changed nothing, and is none.
        if not self.accelerator.sync_gradients or self.accelerator.optimizer_step_was_skipped:
            return
        self._settle_save()
        self.step += 1
        self._timer.step(self._samples_in_step)
        self._samples_in_step = 0
        self._reducer.poll()
        if self._prepares:
            self._prepares = False
            self._saver.prepare()
            self._timer.resume()
        if self.step % self.tracking_config.log_every_n_steps == 0:
            self._collect()
            self._flush_train(wait=False)
        self.progress.step_done(self._batches_in_epoch, self._saver.status)
        if self._max_steps is not None and self.step >= self._max_steps:
            self._ends = True
        asked_signal = self._read_votes()
        # At the epoch's last step it is saved after the evaluation, with its metrics.
        if self._cadence.is_due_after_step(self.step) and not is_epochs_last:
            self._collect()
            self._flush_train(wait=True)
            self._save(f"step-{self.step:08d}")
            self._timer.resume()
        elif self._save_is_asked:
            # What was logged meanwhile goes along: asking for a checkpoint changes no metric.
            self._save(f"step-{self.step:08d}")
            self._timer.resume()
        self._save_is_asked = False
        if asked_signal:
            self._stop(asked_signal)
        if self._votes.is_due():
            self._cast_vote()

    def _cast_vote(self) -> None:
        self._votes.cast([self._run.stop_signal, self._run.take_save_request()])

    def _read_votes(self) -> int:
        """What any rank was asked for, known to all: a save, and the number of the signal to stop by, or 0."""
        asked = self._votes.read()
        if asked is None:
            return 0
        signal_number, save_is_asked = asked
        self._save_is_asked |= bool(save_is_asked)
        return signal_number

    def _stop(self, signal_number: int) -> None:
        """End in good order: a checkpoint of now, on disk, and then the error that ends the loop.

        Raises:
            Stopped: on all ranks alike.
        """
        name = signal.Signals(signal_number).name
        self._collect()
        if self._watched is not None and not self._prepares:
            self._save(f"step-{self.step:08d}", must=True)
            self._settle_save()
            self._saver.wait()
        self.say(f"{name}: stops after step {self.step} ({self._saver.status}); run it again to go on")
        raise Stopped(name)

    def eval_batches(self, loader: Any, limit: int | None = None) -> Iterator[Any]:
        """Iterate over a prepared evaluation loader; what is logged meanwhile is one value at its end.

        Each sample of the data set is on exactly one rank, whatever the number of ranks: samples that
        accelerate repeats to fill the last batch are cut off, and `log` and `update` take nothing from a
        batch that has only such ones.

        Args:
            loader: a loader that went through `accelerator.prepare`.
            limit: end after so many batches; None: all.
        """
        data.check_size(loader, self.topology.world_size, "evaluation")
        self._run.describe_dataset(loader, "eval")
        self._collect()
        if self._watched is not None:
            take_rank_zero_buffers(self._watched.model, self.topology.world_size)
        self._random_before_eval = random_state.take(self.accelerator.device)
        iterator = data.without_repeats(self.accelerator, loader)
        try:
            for position, (batch, counts) in enumerate(iterator, start=1):
                self._logging_to = self._eval_sums if counts else None
                yield batch
                self._run.check()
                if asked_signal := self._read_votes():
                    self._stop(asked_signal)
                if self._votes.is_due():
                    self._cast_vote()
                if position == limit:
                    break
        finally:
            self._logging_to = self._train_sums
            _leave(loader, iterator)
        self._random_before_eval = None
        self._window_rates = {}
        self._reducer.start(self._eval_sums, self.step, self._gauges())
        self._collect()
        self._emit(compute_over_ranks(self._agreement, self._metric_objects), self.step)
        self._metric_objects = {}
        self._timer.resume()

    def on_reduced(self, callback: Callable[[Mapping[str, float], int], None]) -> None:
        """Have `callback` called with each window's reduced values and its step, on every rank alike.

        It is called before a checkpoint is taken that would hold that window's steps; it may raise.
        """
        self._callbacks.append(callback)

    def register(self, name: str, thing: Any) -> None:
        """Have checkpoints hold the state of something else that goes on where it was.

        Effects: not collective; main thread, after `watch`.

        Args:
            name: of its own.
            thing: with `state_dict`, of numbers, text, lists and dicts, the same on every rank, and
                `load_state_dict`, which is called here if the run goes on.

        Raises:
            CheckpointError: if its state cannot be written as JSON.
        """
        try:
            encode(thing.state_dict())
        except TypeError as error:
            raise CheckpointError(f"register({name!r}): its state cannot be written as JSON: {error}") from error
        self._registered[name] = thing
        if self._resumed is not None and name in self._resumed.state.states:
            thing.load_state_dict(decode(self._resumed.state.states[name]))

    def stop(self) -> None:
        """End training after this epoch's body. Every rank must decide alike, as from `latest`."""
        self._ends = self._is_stopped = True

    def save(self) -> bool:
        """Save now, whatever the cadence; whether it was begun (see ``checkpoint.when_busy``).

        Within a batch of `batches` it is done when that batch's optimizer step is counted, so that step and
        data position are those of the weights: true then.

        From outside, the signal SIGUSR2 at any one rank does the same on all of them.
        """
        if self._is_in_batch:
            self._save_is_asked = True
            return True
        self._collect()
        self._flush_train(wait=True)
        # What this returns may be branched on: it is the same on every rank.
        return self._save(f"step-{self.step:08d}") and self._settle_save()

    def say(self, line: str) -> None:
        """A line for the user, from rank zero, of what all ranks know."""
        if self.topology.rank == 0:
            self.progress.say(line)

    # ----------------------------------------------------------------------- logging

    def log(self, values: Mapping[str, Tensor | float], weight: float = 1.0) -> None:
        """Take the means of one batch. Nothing is synchronised, reduced or sent here.

        The value that is published is the mean over all that was logged under the name, by any rank,
        since the last time: weighted, so that uneven batches and ranks give what one process would.

        Args:
            values: name -> tensor of one element on any device, or number.
            weight: how many items the means are over.

        Raises:
            MetricError: if a value is not a single number, or a tensor was changed after it was logged.
        """
        if self._logging_to is not None:
            self._logging_to.add(values, weight)

    def update(self, metrics: Mapping[str, torchmetrics.Metric], *args: Any, **kwargs: Any) -> None:
        """Update torchmetrics objects with a batch of `eval_batches`; they are computed at its end.

        Args:
            metrics: name -> object, or collection of them; give the same objects for each batch.
            args: passed to ``update`` of each.
            kwargs: likewise.
        """
        single = each_metric(metrics)
        for name, metric in single.items():
            if name not in self._metric_objects:
                self._metric_objects[name] = metric.to(self.accelerator.device)
        if self._logging_to is not None:
            for metric in single.values():
                metric.update(*args, **kwargs)

    @property
    def is_log_step_next(self) -> bool:
        """Whether metrics will be reduced at the end of the optimizer step that is running."""
        return (self.step + 1) % self.tracking_config.log_every_n_steps == 0

    def _flush_train(self, *, wait: bool) -> None:
        """Start the reduction of training's sums; read it now, or at the next one."""
        # Once for each step, though a window and a checkpoint may end at it.
        self._window_rates = {} if self._flushed_at_step == self.step else self._learning_rates()
        self._flushed_at_step = self.step
        self._reducer.start(self._train_sums, self.step, self._gauges())
        if wait:
            self._collect()

    def _collect(self) -> None:
        """Finish the reduction that was started last: by now the other ranks have started it too."""
        reduced = self._reducer.finish()
        if reduced is None:
            return
        values = dict(reduced.values)
        if any(reduced.gauges["steps_per_s"]):
            values |= timing.over_ranks(reduced.gauges)
            self._votes.pace(values["perf/step_time_p50_s"])
        values |= self._window_rates
        self._emit(values, reduced.step)
        self._report_save(reduced.step)
        for callback in self._callbacks:
            callback(values, reduced.step)

    def _report_save(self, step: int) -> None:
        """What the last save has cost, and what went wrong with it, in the run: rank zero's."""
        costs, failure = self._saver.take_report()
        if costs:
            self._run.log_metrics(costs, step)
        if failure is not None:
            self.say(f"harness: warning: {failure}")

    def _emit(self, values: Mapping[str, float], step: int) -> None:
        if values:
            self.latest.update(values)
            self._run.log_metrics(values, step)

    def _gauges(self) -> dict[str, float]:
        return {
            **self._timer.take(),
            "memory_bytes": runtime.memory_bytes(self.accelerator.device),
        }

    def _learning_rates(self) -> dict[str, float]:
        optimizer = None if self._watched is None else self._watched.optimizer
        if optimizer is None:
            return {}
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        if len(set(rates)) == 1:
            return {"train/lr": rates[0]}
        return {f"train/lr/group{index}": rate for index, rate in enumerate(rates)}

    # ------------------------------------------------------------------- checkpoints

    def _save(self, name: str, *, must: bool = False) -> bool:
        self._settle_save()
        if self._watched is None or self._saved_at_step == self.step:
            return False
        metrics = {key: value for key, value in self.latest.items() if not key.startswith("perf/")}
        states = {key: encode(thing.state_dict()) for key, thing in self._registered.items()}
        states["harness"] = {"is_stopped": self._is_stopped}
        moment = Moment(
            name,
            self.epoch,
            self.step,
            self._batches_in_epoch,
            _json_ready(metrics),
            self._samples_per_batch,
            self.accelerator.gradient_accumulation_steps,
            states,
        )
        self._run.keep_points(name, moment.metrics)
        self._saver.save(moment, must=must)
        self._saved_at_step, self._is_save_open = self.step, True
        return True

    def _take_rank_state(self) -> RankState:
        """This rank's own part of a checkpoint of now."""
        # Within an evaluation nothing of it is kept: it begins anew, with the same random numbers.
        now = self._random_before_eval or random_state.take(self.accelerator.device)
        return RankState(now, self._batches.state, self._train_sums.partial())

    def _find_checkpoints(self) -> tuple[Found, int | None]:
        assert self.run_path is not None
        found = find_checkpoints(self.run_path / "checkpoints")
        for _, reason in found.damaged:
            self.say(f"harness: warning: {reason}")
        if self._resume_from not in ("auto", "never"):
            if found.usable:
                self.say(f"the run has checkpoints of its own, and goes on from these, not from {self._resume_from}")
            elif found.is_empty:
                uri = self.tracking_config.tracking_uri
                usable = locate("resume_from_checkpoint", self._resume_from, self.run_path / "downloads", uri)
                found = dataclasses.replace(found, usable=usable)
        return found, samples_per_step(found.usable)

    def _resume(self, watched: Watched) -> None:
        assert self._found is not None
        resumed = resume(self._found, self.accelerator, self._agreement, watched, self.say)
        if resumed is None:
            self._take_initial_weights(watched)
            return
        self._resumed = resumed
        state = resumed.state
        self.epoch, self.step = state.epoch, state.step
        self._batches_in_epoch = state.batches_in_epoch
        self._saved_at_step = self.step
        self._is_stopped = bool(state.states["harness"]["is_stopped"])
        self._train_sums.put_back(resumed.sums)
        self.latest.update(state.metrics)
        self._run.resumed(state.step, resumed.name)
        self.say(f"goes on from {resumed.name}: epoch {state.epoch + 1}, step {state.step}")

    def _take_initial_weights(self, watched: Watched) -> None:
        where, run_path = self._initial_weights, self.run_path
        if where is None or run_path is None:
            return
        uri = self.tracking_config.tracking_uri
        path = self._agreement.from_rank_zero(
            "find the initial weights", lambda: locate_weights("initial_weights", where, run_path / "downloads", uri)
        )
        restored = restore_weights(self.accelerator, watched, path, self._agreement)
        self.say(f"begins with the weights of {where}")
        for note in restored.notes:
            self.say(f"harness: warning: {where}: {note}")

    def _take_continuation(self, loader: Any) -> Continuation | None:
        """Where the epoch that begins goes on, once after a resume: at its batch by this loader's size."""
        self._samples_per_batch = getattr(loader, "total_batch_size", None)
        resumed, self._resumed = self._resumed, None
        if resumed is None:
            return None
        num_taken, samples_before = resumed.state.batches_in_epoch, resumed.state.samples_per_batch
        if samples_before is not None and self._samples_per_batch not in (None, samples_before):
            assert self._samples_per_batch is not None
            num_taken, left = divmod(num_taken * samples_before, self._samples_per_batch)
            again = f"; {left} samples come again" if left else ""
            self.say(
                f"harness: a batch of all ranks has {self._samples_per_batch} samples, and had "
                f"{samples_before}: the epoch goes on at batch {num_taken}{again}"
            )
        own = resumed.rank_state
        if own is None:
            return Continuation(num_taken, None, random_state.take(self.accelerator.device))
        return Continuation(num_taken, own.data, own.random)

    def _settle_save(self) -> bool:
        """Whether the last save goes on on every rank: by the next step the others have said so."""
        if not self._is_save_open:
            return self._saved_at_step is not None
        self._is_save_open = False
        if self._saver.settle():
            return True
        self._saved_at_step = None
        self._emit({"checkpoint/num_skipped": float(self._saver.num_skipped)}, self.step)
        return False


def _json_ready(values: Mapping[str, float]) -> dict[str, float]:
    """Finite values alone: JSON has no NaN."""
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        length = len(loader)
    except TypeError:
        return limit
    return length if limit is None else min(length, limit)


def _leave(loader: Any, iterator: Any) -> None:
    """End an iteration early in good order: accelerate clears its state only at the natural end."""
    if hasattr(iterator, "close"):
        iterator.close()
    gradient_state = getattr(loader, "gradient_state", None)
    if gradient_state is not None and loader in gradient_state.dataloader_references:
        loader.end()
