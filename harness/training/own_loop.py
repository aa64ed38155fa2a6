"""Implement the generators of `PeriodicLogger`, which send the loop's events to the controller between items."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.data import dataloaders
from harness.data.batch_size import batch_size
from harness.errors import HarnessError
from harness.training.controller import TrainingController


class OwnLoop:
    """Iterate over epochs, training batches and evaluation batches.

    Attributes:
        is_in_batch: the body of a training batch is running, and its batch is not counted yet.
    """

    def __init__(self, controller: TrainingController) -> None:
        self._controller = controller
        self._context = controller.context
        self._session = controller.context.session
        self._state = controller.state
        self.is_in_batch = False

    def epochs(self, max_epochs: int, max_steps: int | None) -> Iterator[int]:
        """See `PeriodicLogger.epochs`."""
        controller, state = self._controller, self._state
        controller.max_steps = max_steps
        if state.is_stopped or state.epoch >= max_epochs or (max_steps is not None and state.step >= max_steps):
            early = " (it was stopped early)" if state.is_stopped else ""
            self._context.say(
                f"the run is complete: epoch {state.epoch}, step {state.step}{early}; to train on, raise the limits, "
                "or start another run from it with resume_from_checkpoint"
            )
            return
        for epoch in range(state.epoch, max_epochs):
            controller.begin_epoch()
            yield epoch
            controller.end_epoch(max_epochs)
            if state.is_ending:
                return

    def batches(self, loader: Any, limit: int | None) -> Iterator[Any]:
        """See `PeriodicLogger.batches`."""
        controller, state, data = self._controller, self._state, self._state.data
        world_size = self._context.collectives.world_size
        if state.is_ending:
            controller.cut_epoch_short()
            return
        if controller.skip_if_done(loader):
            return
        controller.synchronize()
        if controller.checkpoints.pending and data.loaders_done and self._context.accelerator.sync_gradients:
            # The save was deferred to the epoch's end, but another loader precedes that.
            controller.save_pending()
        dataloaders.check_size(loader, world_size, "training")
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(state.epoch)
        self._context.progress.epoch_begins(state.epoch, _length(loader, limit))
        usual = dataloaders.local_batch_size(loader, world_size)
        loader, iterator = controller.begin_iteration(loader)
        iteration_id, is_empty = data.iteration_id, True
        try:
            if limit is not None and data.batches_done >= limit:
                controller.end_empty_iteration()
                controller.end_iteration()  # the checkpoint has that many batches, in this loader's size
                return
            for batch in iterator:
                if is_empty:
                    is_empty = False
                    controller.record_iteration(has_batches=True)
                    self._session.recorder.describe_dataset(loader, "train", batch)
                is_limit = data.batches_done + 1 == limit
                if is_limit:
                    # An open accumulation must end with the last batch that is used.
                    loader.end_of_dataloader = True
                self.is_in_batch = True
                yield batch
                self.is_in_batch = False
                if data.iteration_id != iteration_id:
                    raise HarnessError(
                        "batches(): two training loaders are iterated over at the same time, so the position to resume "
                        "from is undefined; iterate over one with batches(), and over the other directly"
                    )
                is_last = is_limit or getattr(loader, "end_of_dataloader", False)
                controller.batch_done(batch_size(batch, usual), is_loaders_last=is_last)
                if is_last:
                    return
                if self._state.is_ending:
                    controller.cut_epoch_short()
                    return
            if is_empty:
                controller.end_empty_iteration()
            controller.end_iteration()
        except GeneratorExit:
            # The body left the loop: the rest of the loader is not used in this epoch.
            if data.iteration_id == iteration_id:
                controller.end_iteration()
            raise
        finally:
            self.is_in_batch = False
            controller.end_inputs()
            controller.close_iteration(loader, iterator)

    def eval_batches(self, loader: Any, limit: int | None) -> Iterator[Any]:
        """See `PeriodicLogger.eval_batches`."""
        controller = self._controller
        dataloaders.check_size(loader, self._context.collectives.world_size, "evaluation")
        # Within a training batch its step may be done and not counted: the run stops after that step.
        is_in_batch = self.is_in_batch
        controller.begin_evaluation(is_in_batch=is_in_batch)
        # Without even_batches a rank may have one batch more than another: vote only at batches that all ranks have.
        num_votes = self._num_votes(loader)
        iterator = dataloaders.without_duplicates(self._context.accelerator, loader)
        try:
            for position, (batch, counts) in enumerate(iterator, start=1):
                if position == 1:
                    self._session.recorder.describe_dataset(loader, "eval", batch)
                controller.metrics.begin_evaluation_batch(counts=counts)
                yield batch
                self._session.check()
                if num_votes is None or position <= num_votes:
                    controller.evaluation_batch_done(may_stop=not is_in_batch)
                if position == limit:
                    break
        finally:
            controller.metrics.resume_training()
            dataloaders.close_iteration(loader, iterator)
        controller.end_evaluation()

    def _num_votes(self, loader: Any) -> int | None:
        own = dataloaders.guaranteed_num_batches(loader)
        if own is None:
            return None
        lengths = self._context.collectives.all_gather_numbers("the evaluation's length", [own])
        return min(length for (length,) in lengths)


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        length = len(loader)
    except TypeError:
        return limit
    return length if limit is None else min(length, limit)
