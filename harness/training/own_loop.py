"""The loop of a `PeriodicLogger`: generators of epochs and batches, which tell what happens between what they yield."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from harness.data import dataloaders, rng_state
from harness.data.batch_size import batch_size
from harness.data.resumable_loader import ResumableLoader
from harness.distributed.collectives import Collectives
from harness.errors import HarnessError
from harness.io.progress import Progress
from harness.metrics.aggregator import MetricAggregator
from harness.training.checkpoint_scheduler import CheckpointScheduler
from harness.training.controller import TrainingController
from harness.training.loop_events import LoopEvents
from harness.training.place import TrainingPosition
from harness.training.resume_manager import ResumeManager
from harness.training.run_session import RunSession


@dataclass(frozen=True)
class OwnLoop:
    """Iterates as `PeriodicLogger.epochs`, `batches` and `eval_batches` say.

    Args:
        accelerator: of the loop.
        collectives: of all ranks.
        run: signals, failures of other ranks; the data sets' descriptions.
        place: where training stands.
        batches: where it stands in the data.
        windows: of metrics.
        resumption: what the run goes on from.
        saves: takes the checkpoints.
        course: what is due.
        events: of this loop.
        progress: what a person sees.
    """

    accelerator: Accelerator
    collectives: Collectives
    run: RunSession
    place: TrainingPosition
    batches: ResumableLoader
    windows: MetricAggregator
    resumption: ResumeManager
    saves: CheckpointScheduler
    course: TrainingController
    events: LoopEvents
    progress: Progress

    def over_epochs(self, max_epochs: int, max_steps: int | None) -> Iterator[int]:
        """See `PeriodicLogger.epochs`."""
        place = self.place
        self.course.max_steps = max_steps
        is_stopped = place.is_stopped
        if is_stopped or place.epoch >= max_epochs or (max_steps is not None and place.step >= max_steps):
            self._say_that_it_is_complete()
            return
        for epoch in range(place.epoch, max_epochs):
            self.events.begin_epoch()
            yield epoch
            self.events.end_epoch(max_epochs)
            if self.course.ends:
                return

    def _say_that_it_is_complete(self) -> None:
        if self.collectives.rank == 0:
            early = " (it was stopped early)" if self.place.is_stopped else ""
            self.progress.say(
                f"the run is complete: epoch {self.place.epoch}, step {self.place.step}{early}; to train on, raise the "
                "limits, or begin another run from it with resume_from_checkpoint"
            )

    def over_batches(self, loader: Any, limit: int | None) -> Iterator[Any]:
        """See `PeriodicLogger.batches`."""
        course = self.course
        if self.course.ends:
            course.is_cut_short = True
            return
        if self.resumption.is_done(self.batches.next_loader_index):
            self.events.skip_loader(loader)
            return
        course.synchronize()
        if self.saves.owed is not None and self.batches.loaders_done and self.accelerator.sync_gradients:
            # Not at the end of the epoch after all: there is another loader.
            self.saves.save_owed()
        dataloaders.check_size(loader, self.collectives.world_size, "training")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self.place.epoch)
        self.progress.epoch_begins(self.place.epoch, _length(loader, limit))
        usual = dataloaders.local_batch_size(loader, self.collectives.world_size)
        loader, iterator = self.events.begin_iteration(loader)
        serial, is_empty = self.batches.iteration_id, True
        try:
            if limit is not None and self.batches.batches_done >= limit:
                self.events.end_empty_iteration()
                self.events.end_iteration()  # as many as that were taken, by this loader's size
                return
            for batch in iterator:
                if is_empty:
                    is_empty = False
                    self.events.record_iteration(has_batches=True)
                    self.run.describe_dataset(loader, "train", batch)
                is_limit = self.batches.batches_done + 1 == limit
                if is_limit:
                    # The last one that will be taken: an accumulation that is open must end with it.
                    loader.end_of_dataloader = True
                course.is_in_batch = True
                yield batch
                course.is_in_batch = False
                if self.batches.iteration_id != serial:
                    raise HarnessError(
                        "batches(): two training loaders are iterated over at the same time, so where the run would go "
                        "on cannot be told; iterate over one with batches(), and over the other as it is"
                    )
                is_last = is_limit or getattr(loader, "end_of_dataloader", False)
                course.batch_done(batch_size(batch, usual), is_loaders_last=is_last)
                if is_last:
                    return
                if course.ends:
                    course.is_cut_short = True
                    return
            if is_empty:
                self.events.end_empty_iteration()
            self.events.end_iteration()
        except GeneratorExit:
            # The loop was left: what it has not taken of this epoch is not taken.
            if self.batches.iteration_id == serial:
                self.events.end_iteration()
            raise
        finally:
            course.is_in_batch = False
            course.end_inputs()
            self.events.close_iteration(loader, iterator)

    def over_evaluation(self, loader: Any, limit: int | None) -> Iterator[Any]:
        """See `PeriodicLogger.eval_batches`."""
        dataloaders.check_size(loader, self.collectives.world_size, "evaluation")
        course = self.course
        if not course.is_in_batch:
            course.synchronize()
        self.windows.collect()
        if course.random_to_keep is None:
            course.random_to_keep = rng_state.capture(self.accelerator.device)
        # Where accelerate does not fill batches up, a rank may have one more than another: they vote at those of all.
        num_votes = self._num_votes(loader)
        is_in_batch = course.is_in_batch
        iterator = dataloaders.without_duplicates(self.accelerator, loader)
        try:
            for position, (batch, counts) in enumerate(iterator, start=1):
                if position == 1:
                    self.run.describe_dataset(loader, "eval", batch)
                self.windows.evaluating(counts=counts)
                yield batch
                self.run.check()
                if num_votes is None or position <= num_votes:
                    # Within a training batch its step may be done and not counted, and what was accumulated is in no
                    # checkpoint: it stops behind the step.
                    asked_signal = course.read_votes()
                    if asked_signal and not is_in_batch and self.accelerator.sync_gradients:
                        course.stop(asked_signal)
                    course.vote_at_evaluation()
                if position == limit:
                    break
        finally:
            self.windows.training()
            dataloaders.close_iteration(loader, iterator)
        course.evaluation_ends()
        course.evaluation_done(self.windows.end_evaluation(self.place.step, self.collectives))

    def _num_votes(self, loader: Any) -> int | None:
        """Batches that all ranks have; None: they have as many."""
        own = dataloaders.guaranteed_num_batches(loader)
        if own is None:
            return None
        return min(length for (length,) in self.collectives.all_gather_numbers("the evaluation's length", [own]))


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        length = len(loader)
    except TypeError:
        return limit
    return length if limit is None else min(length, limit)
