"""The course of training as events: an epoch begins, a batch is done, an epoch ends; and what is due at each.

begin_epoch -> batch_done, for each batch -> end_epoch

`PeriodicLogger.epochs` and `batches` are generators over these; loops that are somebody else's call them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accelerate import Accelerator

from harness.config.cadence import Cadence, is_passed
from harness.config.schema import CheckpointConfig, TrackingConfig
from harness.data import dataloaders
from harness.data.resumable_loader import ResumableLoader
from harness.distributed.consensus import Consensus
from harness.distributed.uneven_inputs import UnevenInputs
from harness.errors import Stopped
from harness.io.progress import Progress
from harness.metrics.aggregator import MetricAggregator
from harness.metrics.history import MetricHistory
from harness.run.signals import name_of
from harness.training.checkpoint_scheduler import CheckpointScheduler
from harness.training.place import TrainingPosition
from harness.training.run_session import RunSession
from harness.training.step_counter import StepCounter

# How late a bar is redrawn and, in one process, a request to stop is seen that no signal brings.
_LOOK_EVERY_S = 0.1


class TrainingController:
    """Counts, and does what is due: windows of metrics, checkpoints, the agreement on whether to stop.

    Effects: events are collective, and so are votes: every rank tells of them alike; main thread. They block only where
    a checkpoint needs the metrics of its moment, for the votes of the step before, and in `synchronize`.
    `restart_step_timer`, `ask_for_save`, `pace`, `is_log_step_next`, `end_inputs`, `finish_copy` and `discard_inputs`
    are not collective.

    Args:
        accelerator: of the loop.
        checkpoint: when checkpoints are due.
        tracking: when metrics are.
        place: where training stands: counted here.
        batches: where it stands in the data.
        run: signals, failures of other ranks.
        windows: of metrics.
        history: of metrics.
        saves: takes the checkpoints.
        votes: by which ranks agree.
        progress: what a person sees.
        say: a line for the user.

    Attributes:
        max_steps: optimizer steps after which training ends; None: any number.
        ends: no further batch is taken.
        is_cut_short: the epoch that runs has ended before its last batch.
        is_in_batch: a batch's body runs, which is not counted yet.
        random_to_keep: random numbers that a checkpoint has in place of those of now: as they were when the first
            evaluation since the last training batch began, or what is of the next epoch; None: those of now.
        step_counter: counts the steps of one optimizer of several; None: a step is counted for each batch with which
            the accelerator synchronises gradients.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoint: CheckpointConfig,
        tracking: TrackingConfig,
        place: TrainingPosition,
        batches: ResumableLoader,
        run: RunSession,
        windows: MetricAggregator,
        history: MetricHistory,
        saves: CheckpointScheduler,
        votes: Consensus,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._accelerator = accelerator
        self._tracking = tracking
        self._cadence = Cadence(checkpoint.every_n_epochs, checkpoint.every_n_steps)
        self._saves_last = checkpoint.save_last
        self._place = place
        self._batches = batches
        self._run = run
        self._windows = windows
        self._history = history
        self._saves = saves
        self._votes = votes
        self._uneven = UnevenInputs(votes, num_requests=2)
        # All that was due by steps is done up to here.
        self._step_attended = 0
        self._progress = progress
        self._say = say
        self._save_is_asked = False
        self._asked_signal = 0
        self._is_in_epoch = self._has_met = False
        self._samples_in_step = 0
        # Until then a step is counted, and nothing else is to be done at it; unless this rank is asked for something.
        self._due_at_step = 0
        self._look_at_s = 0.0
        self.max_steps: int | None = None
        self.ends = self.is_cut_short = self.is_in_batch = False
        self.random_to_keep: dict[str, Any] | None = None
        self.step_counter: StepCounter | None = None

    @property
    def is_log_step_next(self) -> bool:
        """Whether metrics will be reduced at the end of the optimizer step that is running."""
        next_step = self._place.step + 1
        if is_passed(self._tracking.log_every_n_steps, next_step):
            return True
        return self._cadence.is_due_after_step(next_step) or self._accelerator.gradient_state.end_of_dataloader

    def begin_epoch(self) -> None:
        """An epoch's body begins."""
        self.is_cut_short = self._has_met = False
        self._is_in_epoch = self._tracking.log_every_n_epochs > 1
        self.restart_step_timer()

    def restart_step_timer(self) -> None:
        """What lies behind is no step's time."""
        self._windows.timer.resume()
        # Whatever has happened meanwhile, a save or a window, is looked after at the next step.
        self._due_at_step = 0

    def end_epoch(
        self,
        max_epochs: int | None,
        random_then: dict[str, Any] | None = None,
        *,
        is_accumulating: bool | None = None,
    ) -> None:
        """An epoch's body is over: reduce what was logged, and save if a checkpoint is due.

        Args:
            max_epochs: number of epochs in all; None: not known.
            random_then: the random numbers at its end; None: those of now.
            is_accumulating: whether gradients were being accumulated at its end; None: as it is now.

        Raises:
            Stopped: on all ranks alike, if a signal asked any of them to stop where the others had no step.
        """
        self.synchronize()
        self._is_in_epoch = False
        is_whole = not self.is_cut_short
        if is_whole:
            self._place.epoch += 1
            self._batches.end_epoch()
        self.random_to_keep = random_then
        is_last = self._place.epoch == max_epochs or self.ends
        is_accumulating = not self._accelerator.sync_gradients if is_accumulating is None else is_accumulating
        self._save_and_log(is_whole=is_whole, is_last=is_last, is_accumulating=is_accumulating)
        if is_last:
            # No step follows that would wait for the copy, and the best weights are often loaded next.
            self.finish_copy()
        self.random_to_keep = None
        self._progress.epoch_done(
            self._place.epoch + self.is_cut_short, self._place.step, self._history.latest, self._saves.status
        )
        if self._has_met and self._asked_signal and not is_last and not is_accumulating:
            self.stop(self._asked_signal)

    def end_training(self) -> None:
        """Training was over with the epoch that has ended, which was not known then. Collective; waits for the disk."""
        if self._saves_last:
            self._windows.collect()
            self._saves.save(f"epoch-{self._place.epoch:04d}", must=True)
        self.finish_copy()

    def finish_copy(self) -> None:
        """Block until the save in flight has copied everything: what follows may write weights outside a step.

        Effects: not collective; main thread; blocks for the rest of the copy, not for the disk.
        """
        self._saves.finish_copy()

    def _save_and_log(self, *, is_whole: bool, is_last: bool, is_accumulating: bool) -> None:
        epoch, step, owed = self._place.epoch, self._place.step, self._saves.owed
        by_epoch = is_whole and self._cadence.is_due_after_epoch(epoch)
        name = f"epoch-{epoch:04d}" if is_whole else self._place.step_name
        if is_whole and not by_epoch and owed is not None:
            name = owed
        saves = by_epoch or owed is not None or (is_last and self._saves_last)
        self._saves.owed = None
        self._windows.collect()
        if saves or is_last or epoch % self._tracking.log_every_n_epochs == 0:
            # A checkpoint carries the metrics of its moment; otherwise nobody waits for them here.
            self._windows.flush(step, wait=saves or is_last)
            self._history.log_withheld()
            if is_whole:
                self._history.add({"epoch": float(epoch)}, step)
        if not saves:
            return
        if is_last or not is_accumulating:
            # The last one is what the training was for: it is not skipped because the disk is busy.
            self._saves.save(name, must=is_last)
        else:
            # Gradients that are accumulated over the epoch's end are in no checkpoint.
            self._saves.owed = name

    def batch_done(self, num_samples: int, *, is_loaders_last: bool, step: int | None = None) -> None:
        """A batch's body is over: with it an optimizer step, unless gradients are still being accumulated.

        Args:
            num_samples: of this rank, in the batch.
            is_loaders_last: no other batch of this loader follows.
            step: optimizer steps that are complete, by the loop's own count; None: as the accelerator has it.

        Raises:
            PeerFailure: if another rank has failed.
            Stopped: on all ranks alike, if a signal asked any of them to stop.
            CheckpointError: on all ranks alike, if the state that is to be saved is not understood, or a save has
                failed and ``checkpoint.when_failed`` is stop. Whatever `on_reduced`'s callbacks raise comes too.
        """
        batches, place, run, votes = self._batches, self._place, self._run, self._votes
        batches.batches_done += 1
        num_taken = batches.batches_done
        self.random_to_keep = None
        if is_loaders_last:
            batches.end_loader()
        self._samples_in_step += num_samples
        is_asked = run.is_asked
        if is_asked:
            run.check()
        if step is None and self.step_counter is not None:
            step = place.step + self.step_counter.take()
        elif step is None:
            # A step that fp16's overflow has skipped has changed nothing, and is none.
            is_step = self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped
            step = place.step + is_step
        before = place.step
        if step <= before:
            return
        place.step = step
        now_s = self._windows.timer.step(self._samples_in_step)
        self._samples_in_step = 0
        votes.num_steps_since_vote += 1
        is_quiet = (
            step < self._due_at_step and votes.num_steps_since_vote < votes.every_n_steps and now_s < self._look_at_s
        )
        if is_quiet and not is_asked:
            return
        self._attend(before, num_taken, is_loaders_last)
        self._due_at_step = self._next_due()
        self._look_at_s = now_s + _LOOK_EVERY_S

    def _next_due(self) -> int:
        """The next step at which more is to be done than to count it: on every rank what is to be done on all."""
        step = self._place.step
        if self._save_is_asked or self._saves.is_waiting or self._windows.is_waiting or self._votes.is_pending:
            return step + 1
        cadences = (self._tracking.log_every_n_steps, self._cadence.every_n_steps)
        due = [step - step % each + each for each in cadences if each is not None]
        return min([*due, sys.maxsize if self.max_steps is None else self.max_steps])

    def _attend(self, before: int, num_taken: int, is_loaders_last: bool) -> None:
        """A step is done at which something is due, or may be; so many were done before.

        A rank may come here at a step at which the others do not: it was asked for something, its window was copied,
        0.1 s have passed. What is collective in here is therefore done by numbers that all ranks have alike (steps,
        votes that were cast, a save that is open), and at a step that is due on all.
        """
        self._windows.poll()
        if self._progress.shows_steps:
            self._progress.step_done(num_taken, self._saves.status)
        if self.max_steps is not None and self._place.step >= self.max_steps:
            self.ends = True
        may_differ = self._uneven.may_be_uneven
        if may_differ:
            if self._uneven.has_diverged or not self._is_due(before):
                return
            # Of an evaluation within the pass, that was left before its end.
            self.read_votes()
            answer = self._uneven.check_step(self._asked_or_known(), is_last=is_loaders_last)
            self._take_asked(answer.requests)
            if not answer.all_present:
                return
            is_loaders_last = answer.is_last
        self._saves.settle()
        if self._saves.prepare():
            self._windows.timer.resume()
        if is_passed(self._tracking.log_every_n_steps, self._place.step, before):
            self._windows.collect()
            self._windows.flush(self._place.step, wait=False)
        if not may_differ:
            self.read_votes()
        self._save_if_due(before, is_loaders_last)
        self._step_attended = self._place.step
        if self._asked_signal:
            self.stop(self._asked_signal)
        if not may_differ:
            self.vote()

    def _is_due(self, before: int) -> bool:
        """Whether anything collective is, by what all ranks know that get to this step."""
        step = self._place.step
        return (
            self._votes.is_due
            or self._save_is_asked
            or self._asked_signal > 0
            or self._saves.is_waiting
            or is_passed(self._tracking.log_every_n_steps, step, before)
            or self._cadence.is_due_after_step(step, before)
            or self.ends
        )

    def _save_if_due(self, before: int, is_loaders_last: bool) -> None:
        is_due = self._cadence.is_due_after_step(self._place.step, before)
        if not (is_due or self._save_is_asked or self._saves.owed is not None):
            return
        name = self._place.step_name
        if (is_due or self._save_is_asked) and is_loaders_last:
            # At the epoch's last step it is saved after the evaluation, with its metrics.
            self._saves.owed = self._saves.owed or name
        elif is_due or self._saves.owed is not None:
            self._saves.owed = self._saves.owed or name
            self._saves.save_owed()
            self._windows.timer.resume()
        elif self._save_is_asked:
            # What was logged meanwhile goes along: asking for a checkpoint changes no metric.
            self._windows.collect()
            self._saves.save(name)
            self._windows.timer.resume()
        self._save_is_asked = False

    def ask_for_save(self) -> None:
        """Save when the step that is running is counted."""
        self._save_is_asked = True
        self._due_at_step = 0

    def evaluation_done(self, values: Mapping[str, float]) -> None:
        """What an evaluation's metric objects have given; in an epoch that may not be logged it waits."""
        self._history.add(values, self._place.step)
        self._history.withholds = False
        self.restart_step_timer()

    def evaluation_ends(self) -> None:
        """An evaluation is about to be reduced."""
        if self._uneven.may_be_uneven:
            self.read_votes()
        self._history.withholds = self._is_in_epoch

    # ------------------------------------------------------------------- what ranks agree on

    def stop_signal_in_evaluation(self) -> int:
        """Number of the signal that asks this process to stop within an evaluation; 0: none, or it cannot stop now.

        For a run of one process: other ranks do not learn of it.
        """
        return self._run.stop_signal if self._accelerator.sync_gradients else 0

    def begin_inputs(self, loader: Any) -> None:
        """A pass over a prepared training loader begins, of which ranks may have different numbers of batches."""
        self.synchronize()
        if may_differ := dataloaders.may_be_uneven(loader, self._accelerator.num_processes):
            self.read_votes()
        self._uneven.begin_iteration(may_be_uneven=may_differ)
        self._step_attended = self._place.step

    @property
    def has_uneven_inputs(self) -> bool:
        """Whether a rank may have fewer batches than another of the pass that runs."""
        return self._uneven.may_be_uneven

    def end_inputs(self) -> None:
        """This rank has no further batch of it. Not collective, and waits for nobody."""
        self._uneven.mark_exhausted()

    def discard_inputs(self) -> None:
        """The pass that has begun is no training's: no step came of it, on any rank."""
        self._uneven.begin_iteration(may_be_uneven=False)

    def synchronize(self) -> None:
        """Before what is collective behind a pass: wait for the longest; from here on its steps are all ranks'."""
        if not self._uneven.may_be_uneven:
            return
        met = self._uneven.synchronize(self._place.step, self._asked_or_known(), is_cut_short=self.is_cut_short)
        self._take_asked(met.requests)
        self.is_cut_short, self._has_met = met.is_cut_short, True
        self._due_at_step = 0
        if met.min_steps < met.max_steps:
            self._saves.ranks_differ(met.max_steps, met.max_steps - met.min_steps)
        self._place.step = met.max_steps
        if self.max_steps is not None and met.max_steps >= self.max_steps:
            self.ends = True
        if met.max_steps and self._saves.prepare():
            self._windows.timer.resume()
        if self._save_is_asked or self._cadence.is_due_after_step(met.max_steps, self._step_attended):
            # At the epoch's end, with all that belongs to it.
            self._saves.owed = self._saves.owed or self._place.step_name
        self._save_is_asked, self._step_attended = False, met.max_steps

    def max_over_ranks(self, number: int) -> int:
        """Of a number of each rank's. Collective, behind `synchronize`; blocks until every rank has called it."""
        self.read_votes()
        self._votes.cast([number])
        found = self._votes.read()
        assert found is not None, "a vote that was cast is there to be read"
        return found[0]

    def _asked(self) -> list[int]:
        """What this rank is asked for: to stop, to save."""
        return [self._run.stop_signal, self._run.take_save_request()]

    def _asked_or_known(self) -> list[int]:
        """The same, with what this rank knows of the others, where these may not know it."""
        signal_number, save_is_asked = self._asked()
        return [self._asked_signal or signal_number, self._save_is_asked or save_is_asked]

    def _take_asked(self, asked: Sequence[int]) -> None:
        signal_number, save_is_asked = asked
        self._save_is_asked |= bool(save_is_asked)
        self._asked_signal = self._asked_signal or signal_number

    def pace(self, step_time_s: float) -> None:
        """Adapt how often it is voted to how long a step takes: the same number on every rank."""
        self._votes.adapt_interval(step_time_s)

    def vote(self) -> None:
        """Say what this rank is asked for, where a vote is due."""
        if self._votes.is_due:
            self._votes.cast(self._asked())
            self._due_at_step = 0

    def vote_at_evaluation(self) -> None:
        """The same at a batch of an evaluation, which counts as a step does."""
        self._votes.num_steps_since_vote += 1
        self.vote()

    def read_votes(self) -> int:
        """What any rank was asked for, known to all: a save, and the number of the signal to stop by, or 0."""
        if (asked := self._votes.read()) is not None:
            self._take_asked(asked)
        return self._asked_signal

    def stop(self, signal_number: int) -> None:
        """End in good order: a checkpoint of now, on disk, and then the error that ends the loop.

        Raises:
            Stopped: on all ranks alike.
        """
        name = name_of(signal_number)
        self._windows.collect()
        if self._saves.is_ready:
            self._saves.save_and_wait()
        self._say(f"{name}: stops after step {self._place.step} ({self._saves.status}); run it again to go on")
        raise Stopped(name)
