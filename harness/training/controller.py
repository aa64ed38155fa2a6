"""Process the events of a training loop: reduce metrics, take checkpoints and stop when due.

    begin_epoch -> begin_iteration -> batch_done, for each batch -> end_iteration, close_iteration -> end_epoch

    observe_iteration -> adopt_iteration, in place of begin_iteration: the iteration began before it was known to train

`PeriodicLogger.epochs` and `batches` send all of these events, and so does autologging. The callback of a framework,
which does not control the data, sends `begin_epoch`, `batch_done` and `end_epoch`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from harness.checkpoint.state.trainer_state import AnyWatched
from harness.config.cadence import Cadence, is_passed
from harness.data import dataloaders, rng_state
from harness.data.pending_iteration import PendingIteration
from harness.errors import CheckpointError, DataError, Stopped
from harness.metrics.aggregator import MetricAggregator, MetricWindow
from harness.run.signals import name_of
from harness.training.checkpoint_scheduler import CheckpointScheduler
from harness.training.rank_requests import RankRequests
from harness.training.resume_manager import ResumeManager
from harness.training.state import TrainingContext, TrainingState
from harness.training.watched import StepCounter

# Interval of display updates and, with one process, of checks for `harness stop`.
_POLL_S = 0.1


class TrainingController:
    """Count batches, steps and epochs, and run the actions due at each.

    Effects: main thread. Collective, and called alike by every rank: `watch`, `resume`, `begin_epoch`, `begin_inputs`,
    `begin_iteration`, `adopt_iteration`, `batch_done`, `synchronize`, `max_over_ranks`, the events of an evaluation,
    `end_epoch`, `end_training`, `flush_metrics`, `flush_metrics_now`, `collect_metrics`, `save_pending`, `save_now`,
    `stop` and `finish`. The rest is local. They block only for the metrics that a checkpoint holds, for the votes of
    the previous step, and in `synchronize`.

    Attributes:
        state: changed by this object alone.
        max_steps: optimizer steps after which training ends; None for no limit.
        step_counter: counts the steps of one optimizer of several. None counts a step for each batch at which the
            accelerator synchronizes gradients.
        callbacks: called with each window's values and step, on every rank.
    """

    def __init__(
        self,
        context: TrainingContext,
        state: TrainingState,
        metrics: MetricAggregator,
        checkpoints: CheckpointScheduler,
        resume: ResumeManager,
        requests: RankRequests,
    ) -> None:
        self.context = context
        self.state = state
        self.metrics = metrics
        self.checkpoints = checkpoints
        self._accelerator = context.accelerator
        self._session = context.session
        self._resume = resume
        self._requests = requests
        self._consensus = requests.consensus
        self._cadence = Cadence(context.checkpoint.every_n_epochs, context.checkpoint.every_n_steps)
        self._log_every_n_steps = context.tracking.log_every_n_steps
        # Everything due by steps is done up to this step.
        self._step_attended = 0
        self._samples_in_step = 0
        # Before this step and this time, a step is only counted, unless this rank has a request.
        self._due_at_step = 0
        self._poll_at_s = 0.0
        self._withholds_evaluation = self._was_synchronized = False
        self._rng_to_restore: dict[str, Any] | None = None
        # Whether any training loader was iterated over in this process, and whether any yielded a batch.
        self._has_iterated = self._has_batches = False
        self.max_steps: int | None = None
        self.step_counter: StepCounter | None = None
        self.callbacks: list[Callable[[Mapping[str, float], int], None]] = []

    @property
    def is_log_step_next(self) -> bool:
        """Whether metrics will be reduced at the end of the current optimizer step."""
        next_step = self.state.step + 1
        if is_passed(self._log_every_n_steps, next_step):
            return True
        return self._cadence.is_due_after_step(next_step) or self._accelerator.gradient_state.end_of_dataloader

    # ------------------------------------------------------------------- start and resume

    def watch(self, watched: AnyWatched) -> None:
        """Save these models and optimizers, and log their learning rates, from now on.

        Raises:
            CheckpointError: on all ranks, if their state could not be saved.
        """
        self.checkpoints.watch(watched)
        self.metrics.rates.optimizers = {
            part.name: part.optimizer for part in watched.parts if part.optimizer is not None
        }
        self.restart_step_timer()

    def resume(self, watched: AnyWatched) -> None:
        """Restore the newest checkpoint and its position, if the run has one."""
        resumed = self._resume.restore(watched)
        if resumed is None:
            return
        state, saved = self.state, resumed.state
        state.epoch, state.step = saved.epoch, saved.step
        state.samples_per_batch, state.is_stopped = saved.samples_per_batch, saved.is_stopped
        state.data.restore(resumed.data, saved.loaders_done, saved.batches_in_epoch)
        self.checkpoints.mark_saved()
        self.metrics.restore(resumed.sums, saved.metrics)
        self._rng_to_restore = None if resumed.rank_state is None else resumed.rank_state.random
        self._set_start(resumed.name)

    def resume_at(self, epoch: int, step: int) -> None:
        """Continue from a position that the loop has restored itself.

        Raises:
            CheckpointError: if `step` is 0 and the run has checkpoints.
        """
        existing = self._resume.skip_restore()
        if existing and not step:
            raise CheckpointError(
                f"{self._session.run_path}: has checkpoints already ({', '.join(sorted(existing)[-3:])}), and training "
                "begins at step 0; have the loop resume from its own checkpoint, or give another run_name"
            )
        self.state.epoch, self.state.step = epoch, step
        self.checkpoints.existing = existing
        if step:
            self._set_start(None)

    def _set_start(self, checkpoint: str | None) -> None:
        state = self.state
        self._session.recorder.set_start(state.step, checkpoint)
        source = "" if checkpoint is None else f" from {checkpoint}"
        self.context.say(f"resumed{source} (epoch {state.epoch}, step {state.step})")

    def restore_rng_state(self) -> None:
        """Restore the RNG states of the checkpoint that the run resumes from, once."""
        if self._rng_to_restore is not None:
            rng_state.restore(self._rng_to_restore, self._accelerator.device)
            self._rng_to_restore = None

    # ---------------------------------------------------------------------- epochs

    def begin_epoch(self) -> None:
        """Begin an epoch."""
        self.metrics.rates.follow()
        self.restore_rng_state()
        self.state.is_cut_short = self._was_synchronized = False
        self._withholds_evaluation = self.context.tracking.log_every_n_epochs > 1
        self.restart_step_timer()

    def restart_step_timer(self) -> None:
        """Exclude the time until now, such as an evaluation's, from the next step's duration."""
        self.metrics.timer.resume()
        # A save or a reduction may have completed since: check at the next step.
        self._due_at_step = 0

    def freeze_learning_rates(self) -> None:
        """Log the current learning rates as the epoch's, even if a scheduler changes them at its end."""
        self.metrics.rates.keep()

    def end_epoch(
        self,
        max_epochs: int | None = None,
        *,
        is_whole: bool = True,
        is_last: bool = False,
        next_iteration: PendingIteration | None = None,
    ) -> None:
        """End an epoch: reduce the logged metrics, and save if a checkpoint is due.

        Args:
            max_epochs: number of epochs in all; None if unknown.
            is_whole: whether the epoch reached its last batch.
            is_last: no other epoch follows, whatever `max_epochs` is.
            next_iteration: an iteration of the next epoch that has begun already: a checkpoint holds the state before
                it.

        Raises:
            Stopped: on all ranks, if a signal asked any rank to stop at a step that not all ranks had.
        """
        self._resume.begin_training()
        self.state.is_cut_short |= not is_whole
        self.state.is_ending |= is_last
        if next_iteration is None:
            self._end_epoch(max_epochs, None)
            return
        with self.state.data.before_next_epoch(next_iteration.generator_states), next_iteration.saved_buffers():
            self._end_epoch(max_epochs, next_iteration)

    def _end_epoch(self, max_epochs: int | None, next_iteration: PendingIteration | None) -> None:
        state = self.state
        self.synchronize()
        self._withholds_evaluation = False
        if not state.is_cut_short:
            state.epoch += 1
            state.data.end_epoch()
        state.rng_override, is_accumulating = None, not self._accelerator.sync_gradients
        if next_iteration is not None:
            state.rng_override, is_accumulating = next_iteration.rng_states, next_iteration.is_accumulating
        is_last = state.epoch == max_epochs or state.is_ending
        self._log_and_save_epoch(is_last=is_last, is_accumulating=is_accumulating)
        if is_last:
            # No later step waits for the copy, and the script may load other weights next.
            self.finish_copy()
        state.rng_override = None
        self.context.progress.epoch_done(
            state.epoch + state.is_cut_short, state.step, self.metrics.latest, self.checkpoints.saver.status
        )
        if self._was_synchronized and self._requests.stop_signal and not is_last and not is_accumulating:
            self.stop(self._requests.stop_signal)

    def _log_and_save_epoch(self, *, is_last: bool, is_accumulating: bool) -> None:
        state, checkpoints = self.state, self.checkpoints
        is_whole = not state.is_cut_short
        by_epoch = is_whole and self._cadence.is_due_after_epoch(state.epoch)
        name = self._epoch_name if is_whole else state.step_name
        pending = checkpoints.pop_pending()
        if is_whole and not by_epoch and pending is not None:
            name = pending
        saves = by_epoch or pending is not None or (is_last and self.context.checkpoint.save_last)
        self.collect_metrics()
        if saves or is_last or state.epoch % self.context.tracking.log_every_n_epochs == 0:
            # A checkpoint holds the current metrics, so it waits for them. Without one, do not wait.
            self.flush_metrics(wait=saves or is_last)
            self.metrics.log_withheld()
            if is_whole:
                self.metrics.publish({"epoch": float(state.epoch)}, state.step)
        if saves and (is_last or not is_accumulating):
            # The last checkpoint waits for a save in flight in place of being skipped.
            checkpoints.save(name, must=is_last)
        elif saves:
            # No checkpoint holds accumulated gradients.
            checkpoints.defer(name)

    @property
    def _epoch_name(self) -> str:
        return f"epoch-{self.state.epoch:04d}"

    def end_training(self) -> None:
        """End training after an epoch that was not known to be the last. Blocks until the last save is copied."""
        if self.context.checkpoint.save_last:
            self.collect_metrics()
            self.checkpoints.save(self._epoch_name, must=True)
        self.finish_copy()

    def finish(self) -> None:
        """Reduce the remaining metrics and wait for the checkpoint in flight.

        Raises:
            DataError: on all ranks, if training loaders were iterated over and no rank got a batch.
            CheckpointError: on all ranks, if the last checkpoint could not be written.
        """
        self.synchronize()
        self.collect_metrics()
        self.flush_metrics(wait=True)
        self._requests.read()
        # Some ranks may have batches while others have none.
        has_iterated, has_batches = self.context.collectives.all_reduce_any(
            "whether any batch came", [self._has_iterated, self._has_batches]
        )
        if has_iterated and not has_batches:
            raise DataError(
                "the training loader gave no batch in any epoch, so nothing was trained; check the data set and, if "
                "the run was resumed, that it is as long as before"
            )
        self.checkpoints.saver.close()

    def request_stop(self) -> None:
        """End training permanently after the current epoch's body."""
        self.state.is_ending = self.state.is_stopped = True

    # ------------------------------------------------------------------- iterations over data

    @property
    def loaders_done(self) -> int:
        """Number of complete training loaders in the current epoch."""
        return self.state.data.loaders_done

    def cut_epoch_short(self) -> None:
        """Record that the current epoch ends before its last batch."""
        self.state.is_cut_short = True

    def skip_loader(self, loader: Any) -> None:
        """Skip a training loader that was complete at the checkpoint."""
        self.state.data.skip_loader(loader)

    def skip_if_done(self, loader: Any) -> bool:
        """Skip the epoch's next training loader if it was complete at the checkpoint; return whether it was."""
        if not self._resume.is_loader_done(self.state.data.next_loader_index):
            return False
        self.skip_loader(loader)
        return True

    def begin_iteration(self, loader: Any) -> tuple[Any, Iterator[Any]]:
        """Begin to iterate over a prepared training loader, from the position that the run resumes from.

        Returns the loader that is iterated over, and its batches; pass both to `close_iteration`.
        """
        self._begin_iteration(loader)
        self.state.rng_override = None
        return self.state.data.begin(loader, self._resume.begin_loader(loader))

    def observe_iteration(self, loader: Any) -> PendingIteration:
        """Observe an iteration until it is adopted (`adopt_iteration`) or discarded (`PendingIteration.discard`)."""
        is_accumulating = not self._accelerator.sync_gradients
        return PendingIteration(loader, self.state.data.wrap_sampler(loader), self._accelerator.device, is_accumulating)

    def adopt_iteration(self, pending: PendingIteration) -> None:
        """Continue an observed iteration as if `begin_iteration` had started it."""
        self._begin_iteration(pending.loader)
        self.state.data.adopt(pending.loader, pending.sampler, pending.data)

    def _begin_iteration(self, loader: Any) -> None:
        self.state.samples_per_batch = dataloaders.global_batch_size(loader, self._accelerator.num_processes)
        self.begin_inputs(loader)
        self.restart_step_timer()

    def count_batches(self, num_batches: int) -> None:
        """Count batches that were completed before the iteration was known to train."""
        self.state.data.batches_done += num_batches

    def record_iteration(self, *, has_batches: bool) -> None:
        """Record that an iteration has yielded its first batch, or has ended without one."""
        self._has_iterated = True
        self._has_batches |= has_batches

    def end_empty_iteration(self) -> bool:
        """Record, before `end_iteration`, that the iteration had no batch.

        Returns whether it was the rest of an interrupted epoch.
        """
        self.record_iteration(has_batches=False)
        if num_batches := self.state.data.batches_done:
            self._resume.warn_if_nothing_is_left(num_batches)
        return num_batches > 0

    def end_iteration(self) -> None:
        """Record that no further batch of the loader is used."""
        self.state.data.end_loader()

    def discard_iteration(self) -> None:
        """Undo `begin_iteration`, as the loader was not trained on: the next loader resumes in its place."""
        self._requests.discard_inputs()
        self.state.data.cancel()
        if (resumed := self._resume.undo_begin_loader()) is not None:
            self.state.data.restore(resumed.data, resumed.state.loaders_done, resumed.state.batches_in_epoch)

    def close_iteration(self, loader: Any, iterator: Iterator[Any]) -> None:
        """Close the iteration of `begin_iteration`, whether it is exhausted or not."""
        self.state.data.release()
        dataloaders.close_iteration(loader, iterator)

    # ---------------------------------------------------------------------- uneven inputs

    @property
    def has_uneven_inputs(self) -> bool:
        """Whether a rank may have fewer batches of the current loader than another."""
        return self._requests.has_uneven_inputs

    def begin_inputs(self, loader: Any) -> None:
        """Record that an iteration over a prepared loader begins. `begin_iteration` calls this."""
        self.synchronize()
        may_be_uneven = dataloaders.may_be_uneven(loader, self._accelerator.num_processes)
        self._requests.begin_inputs(may_be_uneven=may_be_uneven)
        self._step_attended = self.state.step

    def end_inputs(self) -> None:
        """Report that this rank has no further batch of the loader. Not collective; does not block."""
        self._requests.end_inputs()

    def max_over_ranks(self, number: int) -> int:
        """Return the largest number of any rank, after `synchronize`. Blocks until every rank calls it."""
        return self._requests.max_over_ranks(number)

    def synchronize(self) -> None:
        """Wait until every rank has ended a loader of uneven inputs. Afterwards all ranks have the same steps."""
        if not self._requests.has_uneven_inputs:
            return
        state, checkpoints = self.state, self.checkpoints
        result = self._requests.synchronize(state.step, is_cut_short=state.is_cut_short)
        state.is_cut_short, self._was_synchronized = result.is_cut_short, True
        self._due_at_step = 0
        if result.min_steps < result.max_steps:
            checkpoints.mark_ranks_differ(result.max_steps, result.max_steps - result.min_steps)
        state.step = result.max_steps
        if self.max_steps is not None and state.step >= self.max_steps:
            state.is_ending = True
        if state.step and checkpoints.prepare():
            self.metrics.timer.resume()
        if self._requests.is_save_requested or self._cadence.is_due_after_step(state.step, self._step_attended):
            # Saved at the end of the epoch, with the metrics of its evaluation.
            checkpoints.defer(state.step_name)
        self._requests.is_save_requested, self._step_attended = False, state.step

    # ---------------------------------------------------------------------- steps

    def batch_done(self, num_samples: int, *, is_loaders_last: bool, step: int | None = None) -> None:
        """Count a batch and, unless gradients are still being accumulated, an optimizer step.

        Args:
            num_samples: this rank's samples in the batch.
            is_loaders_last: no other batch of this loader follows.
            step: complete optimizer steps, as the loop counts them; None: as the accelerator does.

        Raises:
            PeerFailure: if another rank has failed.
            Stopped: on all ranks, if a signal asked any rank to stop.
            CheckpointError: on all ranks, if the state that is due cannot be saved, or a save has failed and
                ``checkpoint.when_failed`` is stop.
            Exception: if a callback of `PeriodicLogger.on_reduced` raises it.
        """
        state, session, consensus = self.state, self._session, self._consensus
        data = state.data
        data.batches_done += 1
        num_batches = data.batches_done
        state.rng_override = None
        if is_loaders_last:
            data.end_loader()
        self._samples_in_step += num_samples
        has_request = session.has_request
        if has_request:
            session.check()
        before = state.step
        if step is None and self.step_counter is not None:
            step = before + self.step_counter.pop()
        elif step is None:
            # A step that was skipped after an fp16 overflow is not counted.
            step = before + (self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped)
        if step <= before:
            return
        state.step = step
        now_s = self.metrics.timer.step(self._samples_in_step)
        self._samples_in_step = 0
        consensus.num_steps_since_vote += 1
        is_quiet = step < self._due_at_step and consensus.num_steps_since_vote < consensus.every_n_steps
        if is_quiet and now_s < self._poll_at_s and not has_request:
            return
        self._attend(before, num_batches, is_loaders_last)
        self._due_at_step = self._next_due_step()
        self._poll_at_s = now_s + _POLL_S

    def _next_due_step(self) -> int:
        """Return the next step that has actions due. Actions due on all ranks are due at the same step."""
        step, requests = self.state.step, self._requests
        if requests.is_save_requested or self._consensus.is_pending:
            return step + 1
        if self.checkpoints.needs_next_step or self.metrics.is_waiting:
            return step + 1
        cadences = (self._log_every_n_steps, self._cadence.every_n_steps)
        due = [step - step % each + each for each in cadences if each is not None]
        return min([*due, sys.maxsize if self.max_steps is None else self.max_steps])

    def _attend(self, before: int, num_batches: int, is_loaders_last: bool) -> None:
        """Run the actions due at a step; `before` is the number of steps at the previous `batch_done`.

        A rank may call this at a step at which the others do not: it got a signal, its window was copied, or 0.1 s have
        passed. Every collective in here must therefore depend only on numbers that all ranks share (steps, cast votes,
        an unresolved save), and run at a step that is due on all ranks.
        """
        state, requests, checkpoints = self.state, self._requests, self.checkpoints
        self.metrics.poll()
        if self.context.progress.shows_steps:
            self.context.progress.step_done(num_batches, checkpoints.saver.status)
        if self.max_steps is not None and state.step >= self.max_steps:
            state.is_ending = True
        is_uneven = requests.has_uneven_inputs
        if is_uneven:
            if requests.has_diverged or not self._is_collective_due(before):
                return
            status = requests.ask(is_last=is_loaders_last)
            if not status.all_present:
                return
            is_loaders_last = status.is_last
        checkpoints.resolve()
        if checkpoints.prepare():
            self.metrics.timer.resume()
        if is_passed(self._log_every_n_steps, state.step, before):
            self.collect_metrics()
            self.flush_metrics(wait=False)
        if not is_uneven:
            requests.read()
        self._save_if_due(before, is_loaders_last)
        self._step_attended = state.step
        if requests.stop_signal:
            self.stop(requests.stop_signal)
        if not is_uneven:
            self._vote()

    def _is_collective_due(self, before: int) -> bool:
        step, requests = self.state.step, self._requests
        return (
            self._consensus.is_due
            or requests.is_save_requested
            or requests.stop_signal > 0
            or self.checkpoints.needs_next_step
            or is_passed(self._log_every_n_steps, step, before)
            or self._cadence.is_due_after_step(step, before)
            or self.state.is_ending
        )

    def _save_if_due(self, before: int, is_loaders_last: bool) -> None:
        is_due = self._cadence.is_due_after_step(self.state.step, before)
        is_requested, self._requests.is_save_requested = self._requests.is_save_requested, False
        if not (is_due or is_requested or self.checkpoints.pending is not None):
            return
        name = self.state.step_name
        if (is_due or is_requested) and is_loaders_last:
            # At the epoch's last step, save after the evaluation, with its metrics.
            self.checkpoints.defer(name)
            return
        if is_due or self.checkpoints.pending is not None:
            self.checkpoints.defer(name)
            self.save_pending()
        else:
            # Do not flush the window, so that a requested save changes no metric; the checkpoint holds the sums.
            self.collect_metrics()
            self.checkpoints.save(name)
        self.metrics.timer.resume()

    def _vote(self) -> None:
        if self._requests.vote():
            self._due_at_step = 0

    # ---------------------------------------------------------------------- evaluations

    def begin_evaluation(self, *, is_in_batch: bool) -> None:
        """Begin an evaluation of the epoch or, with `is_in_batch`, within a training batch."""
        if not is_in_batch:
            self.synchronize()
        self.collect_metrics()
        if self.state.rng_override is None:
            self.state.rng_override = rng_state.capture(self._accelerator.device)

    def evaluation_batch_done(self, *, may_stop: bool) -> None:
        """Exchange requests at a batch that every rank has; the batch counts as a step for the votes.

        Raises:
            Stopped: on all ranks, if a signal asked any rank to stop and no gradients are being accumulated.
        """
        signal_number = self._requests.read()
        if signal_number and may_stop and self._accelerator.sync_gradients:
            self.stop(signal_number)
        self._consensus.num_steps_since_vote += 1
        self._vote()

    def end_evaluation(self) -> None:
        """Reduce and publish an evaluation. Within an epoch that may not be logged its values are withheld."""
        if self._requests.has_uneven_inputs:
            self._requests.read()
        self.metrics.withholds = self._withholds_evaluation
        self._publish(self.metrics.reduce_evaluation(self.state.step))
        values = self.metrics.compute_objects(self.context.collectives)
        self.metrics.publish(values, self.state.step)
        self.metrics.withholds = False
        self.restart_step_timer()

    # ---------------------------------------------------------------------- metrics

    def log(self, values: Mapping[str, Any], weight: float) -> None:
        """See `PeriodicLogger.log`."""
        self.metrics.log(values, weight)

    def flush_metrics(self, *, wait: bool) -> None:
        """Start the reduction of the current window; with `wait` also finish it."""
        self.metrics.flush(self.state.step)
        if wait:
            self.collect_metrics()

    def collect_metrics(self) -> None:
        """Finish and publish the reduction that was started last."""
        self._publish(self.metrics.collect())

    def collect_metrics_without_waiting(self) -> None:
        """Publish a reduction that is complete on this rank, for a rank that ends alone. Not collective."""
        self._publish(self.metrics.collect_without_waiting())

    def _publish(self, window: MetricWindow | None) -> None:
        if window is None:
            return
        values, step = window
        if "perf/step_time_p50_s" in values:
            # The value is the same on every rank, so the cadence of votes is too.
            self._consensus.adapt_interval(values["perf/step_time_p50_s"])
        self.metrics.publish(values, step)
        self.checkpoints.report(step)
        for callback in self.callbacks:
            callback(values, step)

    # ---------------------------------------------------------------------- saving, stopping

    def request_save(self) -> None:
        """Save once the current step is counted."""
        self._requests.is_save_requested = True
        self._due_at_step = 0

    def save_now(self) -> bool:
        """Save between steps; return whether the save was started, which is the same on every rank."""
        self.synchronize()
        self.flush_metrics_now()
        has_begun = self.checkpoints.save(self.state.step_name) and self.checkpoints.resolve()
        # The next write to the weights may not be a step, which would wait for the copy.
        self.finish_copy()
        return has_begun

    def save_pending(self) -> None:
        """Take the pending checkpoint, with the current metrics."""
        self.flush_metrics_now()
        name = self.checkpoints.pop_pending()
        assert name is not None, "a checkpoint is pending"
        self.checkpoints.save(name)

    def flush_metrics_now(self) -> None:
        """Reduce and publish all logged metrics."""
        self.collect_metrics()
        self.flush_metrics(wait=True)

    def finish_copy(self) -> None:
        """Block until the save in flight has copied its tensors, not until it is on disk. Not collective."""
        self.checkpoints.saver.finish_copy()

    def stop_signal_in_evaluation(self) -> int:
        """Return the signal that asks this process to stop in an evaluation; 0 without one or while accumulating.

        Only for a run of one process: other ranks do not learn of the signal.
        """
        return self._session.stop_signal if self._accelerator.sync_gradients else 0

    def stop(self, signal_number: int) -> None:
        """Save the current state, wait for the disk, and raise `Stopped` to end the loop.

        Raises:
            Stopped: on all ranks.
        """
        name = name_of(signal_number)
        self.collect_metrics()
        if self.checkpoints.is_ready:
            self.checkpoints.save_and_wait()
        status = self.checkpoints.saver.status
        self.context.say(f"{name}: stopped after step {self.state.step} ({status}); run it again to continue")
        raise Stopped(name)
