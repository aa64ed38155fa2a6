"""What happens in a loop, told as it happens: by `PeriodicLogger`'s own, and by loops that are somebody else's.

    begin_epoch  ->  begin_data  ->  batch_done, for each batch  ->  end_data, leave_data  ->  end_epoch

    overhear  ->  adopt_data in place of begin_data, where a pass had begun before it was known to train

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

    Effects: `begin_epoch`, `begin_pass`, `meet`, `largest`, `batch_done`, `end_epoch`, `end_training`, `begin_data`,
    `adopt_data` and `require_batches` are collective: every rank tells them alike; the rest is not. Main thread. They
    block as `TrainingController` says.

    Args:
        accelerator: of the loop.
        place: where training stands.
        batches: where it stands in the data.
        resumption: what the run goes on from.
        course: what is due.
        windows: of metrics.
        rates: the learning rates.

    Attributes:
        place: where training stands.
        batch_done: see `TrainingController.batch_done`.
        begin_pass: see `TrainingController.begin_pass`; `begin_data` does it.
        end_pass: see `TrainingController.end_pass`.
        meet: see `TrainingController.meet`; `end_epoch` does it.
        largest: see `TrainingController.largest`.
        end_training: see `TrainingController.end_training`.
        log: see `PeriodicLogger.log`.
        finish_copy: see `TrainingController.finish_copy`. `end_epoch` calls it for the last epoch.
        stop_within_evaluation: see `TrainingController.stop_within_evaluation`.
        skip_time: what lies behind is no step's time: an evaluation, say, that is not `eval_batches`'s.
        keep_learning_rates: those of now are the epoch's, whatever its end does to them.
        random_to_begin_with: random numbers as they were when the checkpoint was taken that the run goes on from.
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
        self.place = place
        self._batches = batches
        self._resumption = resumption
        self._course = course
        self._rates = rates
        self.batch_done = course.batch_done
        self.begin_pass, self.end_pass, self.meet = course.begin_pass, course.end_pass, course.meet
        self.largest, self.end_training = course.largest, course.end_training
        self.finish_copy = course.finish_copy
        self.stop_within_evaluation = course.stop_within_evaluation
        self.log = windows.log
        self.skip_time = course.skip_time
        self.keep_learning_rates = rates.keep
        self.random_to_begin_with: dict[str, Any] | None = None
        # Whether a pass over training data has been asked for in this process, and whether any gave a batch.
        self._has_passes = self._has_batches = False

    @property
    def may_differ(self) -> bool:
        """Whether a rank may have fewer batches than another of the pass that runs."""
        return self._course.may_differ

    @property
    def loaders_done(self) -> int:
        """Training loaders of the epoch that runs that are done."""
        return self._batches.loaders_done

    def begin_epoch(self) -> None:
        """An epoch begins."""
        self._rates.follow()
        self.put_back_random()
        self._course.begin_epoch()

    def put_back_random(self) -> None:
        """Random numbers are those of the checkpoint that the run goes on from, once."""
        if self.random_to_begin_with is not None:
            rng_state.put_back(self.random_to_begin_with, self._accelerator.device)
            self.random_to_begin_with = None

    def end_epoch(
        self,
        max_epochs: int | None = None,
        *,
        is_whole: bool = True,
        is_last: bool = False,
        behind: PendingIteration | None = None,
    ) -> None:
        """An epoch is over: what was logged is reduced, and a checkpoint is taken if it is due.

        Args:
            max_epochs: number of epochs in all, so that the last one is known; None: it is not.
            is_whole: it was not left before its last batch.
            is_last: no other epoch follows, whatever their number was to be.
            behind: a pass that runs already, and is of the next epoch: a checkpoint is of the moment before it.
        """
        self._resumption.end()
        self._course.is_cut_short |= not is_whole
        self._course.ends |= is_last
        if behind is None:
            self._course.end_epoch(max_epochs)
            return
        with self._batches.next_has_begun(behind.generators), behind.before_forward():
            self._course.end_epoch(max_epochs, behind.random, is_accumulating=behind.is_accumulating)

    # ------------------------------------------------------------------------- the data

    def begin_data(self, loader: Any) -> tuple[Any, Iterator[Any]]:
        """Iterate over a training loader, from where the run goes on in it.

        Args:
            loader: a loader that went through `accelerator.prepare`.

        Returns:
            The loader that is really iterated over, and its batches; `leave_data` takes both when they are left.
        """
        self._begin_pass(loader)
        self._course.random_to_keep = None
        return self._batches.begin(loader, self._resumption.take(loader))

    def overhear(self, loader: Any) -> PendingIteration:
        """A pass over a loader is about to begin that may turn out to train: `adopt_data` it then, or `leave` it."""
        is_accumulating = not self._accelerator.sync_gradients
        return PendingIteration(loader, self._batches.wrapped(loader), self._accelerator.device, is_accumulating)

    def adopt_data(self, heard: PendingIteration) -> None:
        """A pass that runs is over the epoch's next training loader: as if `begin_data` had begun it."""
        self._begin_pass(heard.loader)
        self._batches.adopt(heard.loader, heard.sampler, heard.data)

    def _begin_pass(self, loader: Any) -> None:
        self.place.samples_per_batch = dataloaders.samples_per_batch(loader, self._accelerator.num_processes)
        self._course.begin_pass(loader)
        self._course.skip_time()

    def skip_data(self, loader: Any) -> None:
        """A training loader of the epoch was done before the run was cut off."""
        self._batches.skip(loader)

    def count_data(self, num_batches: int) -> None:
        """So many batches of `begin_data` were done before it was known that they are training's."""
        self._batches.num_taken += num_batches

    def note_pass(self, *, has_batches: bool) -> None:
        """A pass over training data has given its first batch, or has ended without one."""
        self._has_passes = True
        self._has_batches |= has_batches

    def end_empty_pass(self) -> bool:
        """The pass of `begin_data` has ended without a batch; before `end_data`.

        Returns:
            Whether it was the rest of an epoch that was cut off, of which nothing is left.
        """
        self.note_pass(has_batches=False)
        if num_taken := self._batches.num_taken:
            self._resumption.say_that_nothing_is_left(num_taken)
        return num_taken > 0

    def require_batches(self, agreement: Collectives) -> None:
        """Refuse a training whose passes have all been empty. At its end.

        Args:
            agreement: of all ranks: one of them may have batches where others have none.

        Raises:
            DataError: on all ranks, if passes over training data were asked for and no rank got a batch.
        """
        has_passes, has_batches = agreement.on_any("whether any batch came", [self._has_passes, self._has_batches])
        if has_passes and not has_batches:
            raise DataError(
                "epochs were asked for, and the training loader gave no batch in any of them, so nothing was trained; "
                "check the data set and, where the run was resumed, that it is as long as before"
            )

    def end_data(self) -> None:
        """No other batch of `begin_data` is taken."""
        self._batches.end()

    def forget_data(self) -> None:
        """What `begin_data` has begun was no training: where the run goes on in it, the next one does."""
        self._course.forget_pass()
        self._batches.forget()
        if (resumed := self._resumption.give_back()) is not None:
            self._batches.restore(resumed.data, resumed.state.loaders_done, resumed.state.batches_in_epoch)

    def leave_data(self, loader: Any, iterator: Iterator[Any]) -> None:
        """The iteration of `begin_data` is over, or is left early."""
        self._batches.leave()
        dataloaders.leave(loader, iterator)
