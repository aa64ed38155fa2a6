"""What happens in a loop, told as it happens: by `PeriodicLogger`'s own, and by loops that are somebody else's.

    begin_epoch  ->  begin_iteration  ->  batch_done, for each batch  ->  end_iteration, close_iteration  ->  end_epoch

    observe_iteration  ->  adopt_iteration, in place of begin_iteration: a pass had begun before it was known to train

Autologging tells all of it. A framework's callback, which has no hand in the data, tells epochs and batches alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from harness.data import dataloaders, rng_state
from harness.data.pending_iteration import PendingIteration
from harness.data.resumable_loader import ResumableLoader
from harness.distributed.collectives import Collectives
from harness.errors import DataError
from harness.metrics.aggregator import MetricAggregator
from harness.metrics.learning_rates import LearningRates
from harness.training.controller import TrainingController
from harness.training.place import TrainingPosition
from harness.training.resume_manager import ResumeManager


class LoopEvents:
    """Takes the events of a loop, and knows where the data go on.

    Effects: `begin_epoch`, `begin_inputs`, `synchronize`, `max_over_ranks`, `batch_done`, `end_epoch`, `end_training`,
    `begin_iteration`, `adopt_iteration` and `require_batches` are collective: every rank calls them alike; the rest is
    not. Main thread. They block as `TrainingController` says.

    Args:
        accelerator: of the loop.
        place: where training stands.
        batches: where it stands in the data.
        resumption: what the run goes on from.
        course: what is due.
        windows: of metrics.
        rates: the learning rates.

    Attributes:
        state: where training stands.
        batch_done: see `TrainingController.batch_done`.
        begin_inputs: see `TrainingController.begin_inputs`; `begin_iteration` does it.
        end_inputs: see `TrainingController.end_inputs`.
        synchronize: see `TrainingController.synchronize`; `end_epoch` does it.
        max_over_ranks: see `TrainingController.max_over_ranks`.
        end_training: see `TrainingController.end_training`.
        log: see `PeriodicLogger.log`.
        finish_copy: see `TrainingController.finish_copy`. `end_epoch` calls it for the last epoch.
        stop_signal_in_evaluation: see `TrainingController.stop_signal_in_evaluation`.
        stop: see `TrainingController.stop`.
        restart_step_timer: what lies behind is no step's time: an evaluation, say, that is not `eval_batches`'s.
        freeze_learning_rates: those of now are the epoch's, whatever its end does to them.
        rng_state_to_restore: random numbers as they were when the checkpoint was taken that the run goes on from.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        place: TrainingPosition,
        batches: ResumableLoader,
        resumption: ResumeManager,
        course: TrainingController,
        windows: MetricAggregator,
        rates: LearningRates,
    ) -> None:
        self._accelerator = accelerator
        self.state = place
        self._batches = batches
        self._resumption = resumption
        self._course = course
        self._rates = rates
        self.batch_done = course.batch_done
        self.begin_inputs, self.end_inputs, self.synchronize = (
            course.begin_inputs,
            course.end_inputs,
            course.synchronize,
        )
        self.max_over_ranks, self.end_training = course.max_over_ranks, course.end_training
        self.finish_copy = course.finish_copy
        self.stop_signal_in_evaluation = course.stop_signal_in_evaluation
        self.stop = course.stop
        self.log = windows.log
        self.restart_step_timer = course.restart_step_timer
        self.freeze_learning_rates = rates.keep
        self.rng_state_to_restore: dict[str, Any] | None = None
        # Whether a pass over training data has been asked for in this process, and whether any gave a batch.
        self._has_passes = self._has_batches = False

    @property
    def has_uneven_inputs(self) -> bool:
        """Whether a rank may have fewer batches than another of the pass that runs."""
        return self._course.has_uneven_inputs

    @property
    def loaders_done(self) -> int:
        """Training loaders of the epoch that runs that are done."""
        return self._batches.loaders_done

    def begin_epoch(self) -> None:
        """An epoch begins."""
        self._rates.follow()
        self.restore_rng_state()
        self._course.begin_epoch()

    def restore_rng_state(self) -> None:
        """Random numbers are those of the checkpoint that the run goes on from, once."""
        if self.rng_state_to_restore is not None:
            rng_state.restore(self.rng_state_to_restore, self._accelerator.device)
            self.rng_state_to_restore = None

    def end_epoch(
        self,
        max_epochs: int | None = None,
        *,
        is_whole: bool = True,
        is_last: bool = False,
        next_iteration: PendingIteration | None = None,
    ) -> None:
        """An epoch is over: what was logged is reduced, and a checkpoint is taken if it is due.

        Args:
            max_epochs: number of epochs in all, so that the last one is known; None: it is not.
            is_whole: it was not left before its last batch.
            is_last: no other epoch follows, whatever their number was to be.
            next_iteration: a pass that runs already, and is of the next epoch: a checkpoint is of the moment before it.
        """
        self._resumption.end()
        self._course.is_cut_short |= not is_whole
        self._course.ends |= is_last
        if next_iteration is None:
            self._course.end_epoch(max_epochs)
            return
        with self._batches.before_next_epoch(next_iteration.generator_states), next_iteration.saved_buffers():
            self._course.end_epoch(
                max_epochs, next_iteration.rng_states, is_accumulating=next_iteration.is_accumulating
            )

    # ------------------------------------------------------------------------- the data

    def begin_iteration(self, loader: Any) -> tuple[Any, Iterator[Any]]:
        """Iterate over a training loader, from where the run goes on in it.

        Args:
            loader: a loader that went through `accelerator.prepare`.

        Returns:
            The loader that is really iterated over, and its batches; `close_iteration` takes both when they are left.
        """
        self._begin_pass(loader)
        self._course.random_to_keep = None
        return self._batches.begin(loader, self._resumption.take(loader))

    def observe_iteration(self, loader: Any) -> PendingIteration:
        """Observe a pass that may turn out to train: then `adopt_iteration`, else `PendingIteration.discard`."""
        is_accumulating = not self._accelerator.sync_gradients
        return PendingIteration(loader, self._batches.wrap_sampler(loader), self._accelerator.device, is_accumulating)

    def adopt_iteration(self, heard: PendingIteration) -> None:
        """A pass that runs is over the epoch's next training loader: as if `begin_iteration` had begun it."""
        self._begin_pass(heard.loader)
        self._batches.adopt(heard.loader, heard.sampler, heard.data)

    def _begin_pass(self, loader: Any) -> None:
        self.state.samples_per_batch = dataloaders.global_batch_size(loader, self._accelerator.num_processes)
        self._course.begin_inputs(loader)
        self._course.restart_step_timer()

    def skip_loader(self, loader: Any) -> None:
        """A training loader of the epoch was done before the run was cut off."""
        self._batches.skip_loader(loader)

    def count_batches(self, num_batches: int) -> None:
        """So many batches of `begin_iteration` were done before it was known that they are training's."""
        self._batches.batches_done += num_batches

    def record_iteration(self, *, has_batches: bool) -> None:
        """A pass over training data has given its first batch, or has ended without one."""
        self._has_passes = True
        self._has_batches |= has_batches

    def end_empty_iteration(self) -> bool:
        """The pass of `begin_iteration` has ended without a batch; before `end_iteration`.

        Returns:
            Whether it was the rest of an epoch that was cut off, of which nothing is left.
        """
        self.record_iteration(has_batches=False)
        if num_taken := self._batches.batches_done:
            self._resumption.say_that_nothing_is_left(num_taken)
        return num_taken > 0

    def require_batches(self, collectives: Collectives) -> None:
        """Refuse a training whose passes have all been empty. At its end.

        Args:
            collectives: of all ranks: one of them may have batches where others have none.

        Raises:
            DataError: on all ranks, if passes over training data were asked for and no rank got a batch.
        """
        has_passes, has_batches = collectives.all_reduce_any(
            "whether any batch came", [self._has_passes, self._has_batches]
        )
        if has_passes and not has_batches:
            raise DataError(
                "epochs were asked for, and the training loader gave no batch in any of them, so nothing was trained; "
                "check the data set and, where the run was resumed, that it is as long as before"
            )

    def end_iteration(self) -> None:
        """No other batch of `begin_iteration` is taken."""
        self._batches.end_loader()

    def discard_iteration(self) -> None:
        """What `begin_iteration` has begun was no training: where the run goes on in it, the next one does."""
        self._course.discard_inputs()
        self._batches.cancel()
        if (resumed := self._resumption.give_back()) is not None:
            self._batches.restore(resumed.data, resumed.state.loaders_done, resumed.state.batches_in_epoch)

    def close_iteration(self, loader: Any, iterator: Iterator[Any]) -> None:
        """The iteration of `begin_iteration` is over, or is left early."""
        self._batches.release()
        dataloaders.close_iteration(loader, iterator)
