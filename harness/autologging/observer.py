"""Report a script's iterations over its loaders as the epochs and steps of a run, with a state machine.

    event                                       action
    an iteration begins that is likely          end the open epoch, begin the next one
    backward                                    keep the loss; the iteration trains, and its epoch is open
    the script asks for the next batch          report the loss and the step of the last one
    the script, or the training, ends           end the open epoch, as the last one

An epoch is one iteration over a loader that trains. It ends when the next one begins or the script ends, so it includes
the evaluation and scheduler step before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.autologging.autolog_state import AutologState, IterationEnd
from harness.autologging.context import UserMessages
from harness.autologging.iterations import Iteration, IterationKey, IterationState
from harness.autologging.optimizer_steps import OptimizerSteps
from harness.autologging.script import CheckpointContent, Prepared
from harness.data import dataloaders
from harness.data.pending_iteration import PendingIteration
from harness.errors import EXIT_REQUEUE, Stopped
from harness.training.periodic_logger import PeriodicLogger

Original = Callable[[Any], Iterator[Any]]


class EpochState(Enum):
    """Where the observer is between epochs.

        NONE  ->  OPEN  ->  BETWEEN  ->  OPEN  ...  ->  DONE

    NONE: nothing was trained. OPEN: an epoch has been trained in. BETWEEN: an epoch has ended, perhaps the last one,
    and nothing was trained since. DONE: the last epoch has ended.
    """

    NONE = "none"
    OPEN = "open"
    BETWEEN = "between"
    DONE = "done"


class EpochListener(Protocol):
    """Receives an observer's notifications."""

    def epoch_begins(self) -> None:
        """An epoch begins that was not completed before."""

    def fail(self, error: BaseException) -> BaseException:
        """The run was stopped; returns the error that ended it."""


class EpochObserver:
    """Reports a script's iterations to a `PeriodicLogger`.

    Effects: `iterate` (as the loader's own iteration, and at the ends of epochs), `backward`, the model's forward (the
    first one of an iteration may end an epoch) and `end` are collective, as the script's own iterations are: every rank
    calls them alike, in the main thread. The rest is not. A hook on all optimizers is registered until `close`.

    Args:
        content: what checkpoints contain; None if there are none.
        listener: notified of epochs and of a stop.
    """

    def __init__(
        self,
        logger: PeriodicLogger,
        prepared: Prepared,
        content: CheckpointContent | None,
        state: AutologState,
        listener: EpochListener,
        messages: UserMessages,
    ) -> None:
        self._logger = logger
        self._events = logger.events
        self._prepared = prepared
        self._training = state.training
        self._content = content
        self._model: nn.Module | None = None if content is None else content.model
        self._listener = listener
        self._messages = messages
        self._steps = OptimizerSteps(logger, prepared, content, state, messages)
        self._step_hook = register_optimizer_step_post_hook(self._optimizer_stepped)
        self._epoch = EpochState.NONE
        # The open iteration that trains, or may train.
        self._current: Iteration | None = None
        # The last one that trained or may have: a script may fetch all batches before the first backward.
        self._ended: Iteration | None = None
        # The loader whose iteration is part of the current one.
        self._inner: Any = None
        # The script's `Join` context as the epoch began.
        self._join_of_epoch: Any = None
        # The end of the last training iteration, with one process; None once more is trained.
        self._iteration_end: IterationEnd | None = None
        # accelerate's count of the loader's iterations as the current one began.
        self._iteration_number: int | None = None
        # (number of samples, whether it was a step) of the batch at which the script left an iteration, until reported.
        self._unreported: tuple[int, bool] | None = None

    def is_inner(self, loader: Any) -> bool:
        """Whether a loader is iterated over as part of the current iteration."""
        return loader is self._inner

    def key_of(self, loader: Any) -> IterationKey:
        """Return the key of an iteration that begins now."""
        return IterationKey(self._prepared.index_of(loader), self._is_in_train_mode)

    def reopen_epoch(self) -> None:
        """Reopen the epoch that was fully trained before the run was interrupted and lacks only its end."""
        self._epoch = EpochState.OPEN

    def iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        """Iterate over a loader, with the same batches as without autologging."""
        outer, training = self._current, self._training
        if outer is None:
            return self._iterate(loader, original)
        # An iteration that is known to train replaces one that has not trained.
        is_known = bool(training.keys) and training.is_likely(self.key_of(loader))
        if outer.is_training or (outer.may_continue_around(loader) and not is_known):
            return self._iterate_within(loader, original, outer)
        return self._iterate(loader, original)

    def backward(self, loss: Any) -> bool:
        """Observe a call of backward; returns False if it belongs to no iteration."""
        this = self._current or self._ended
        if this is None:
            return False
        self._iteration_end = None
        if not this.is_training:
            self._becomes_training(this)
            if this is self._ended:
                self._events.end_inputs()  # all its batches were fetched before
                self._events.end_iteration()
        this.add_loss(loss)
        if this is self._ended:
            self._record_training(this)
        return True

    def end(self) -> None:
        """End the last epoch, since the training is over."""
        this = self._current
        if this is None or not this.is_training:
            if self._epoch is EpochState.OPEN:
                self._end_epoch(is_last=True)
            elif self._epoch is EpochState.BETWEEN:
                self._events.end_training()
            return
        # The script still holds the iterator, so the training ends within the epoch.
        if this.has_unreported_work:
            self._report_batch(this, is_last=False)
        self._current = self._inner = None
        self._epoch = EpochState.DONE
        self._events.end_epoch(is_whole=False, is_last=True)

    def close(self) -> None:
        """Stop reporting."""
        self._current = self._inner = self._ended = None
        self._step_hook.remove()

    # ------------------------------------------------------------------------------ one iteration

    def _iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        key = self.key_of(loader)
        is_likely = self._training.is_likely(key)
        is_part = is_likely and self._is_in_join_of_epoch
        before, ended = self._current, self._ended
        this = Iteration(loader, key, self._usual_size(loader), is_likely=is_likely and not is_part, is_part=is_part)
        self._current = this
        self._iteration_number = getattr(loader, "iteration", None)
        if (before is not None and before.is_tracked) or (ended is not None and not ended.is_training):
            # The previous iteration did not train, whether its iterator is open or all its batches are fetched.
            self._events.discard_iteration()
            self._ended = None
        if is_part:
            self._continue_epoch()
            return self._batches(this, loader, original(loader))
        if is_likely:
            self._begin_epoch()
            self._inner = loader
            inner, iterator = self._events.begin_iteration(loader)
            self._inner = inner
            return self._batches(this, inner, iterator)
        if torch.is_grad_enabled():
            this.pending = self._events.observe_iteration(loader)
            if self._model is not None:
                # This hook runs before FSDP's, which gathers the parameters.
                this.hook = self._model.register_forward_pre_hook(lambda *_: self._before_forward(this), prepend=True)
        return self._batches(this, loader, original(loader))

    def _iterate_within(self, loader: Any, original: Original, outer: Iteration) -> Iterator[Any]:
        """Iterate within an iteration that trains or may train: an evaluation, or a second loader beside its loader."""
        this = Iteration(loader, self.key_of(loader), self._usual_size(loader), is_likely=False)
        outer.is_crossed |= loader is outer.loader
        if not outer.is_training:
            this.pending = self._events.observe_iteration(loader)
        return self._batches(this, loader, original(loader), outer)

    def _batches(
        self, this: Iteration, inner: Any, iterator: Iterator[Any], outer: Iteration | None = None
    ) -> Iterator[Any]:
        try:
            for batch in iterator:
                if this.is_empty:
                    self._describe(this, batch)
                this.add_batch(batch)
                if this is self._current:
                    self._events.record_iteration(has_batches=True)
                    # A further iteration over the loader is the script's own.
                    self._inner = None
                yield batch
                if this.is_training and this is self._current:
                    is_last = not this.is_crossed and getattr(inner, "end_of_dataloader", False)
                    self._report_batch(this, is_last=is_last)
                    continue
                this.num_unreported += 1
                if outer is None and not this.is_tracked:
                    self._stop_if_signalled()
                if outer is not None and outer is self._current and this.replaces(outer):
                    self._replace(this, outer)
            if this is self._current and this.is_empty:
                self._ended_without_batch(this)
        except GeneratorExit:
            if this is self._current and this.is_training and this.has_unreported_work:
                # Reporting is collective, so the end of the epoch does it: generators may be closed at any time.
                self._log_loss(this)
                self._unreported = (this.num_samples, this.take_step())
            raise
        finally:
            this.remove_hook()
            if this is self._current:
                self._end_iteration(this, inner, iterator)
            elif this.pending is not None:
                this.pending.discard()
            if outer is not None and outer is self._current:
                self._events.restart_step_timer()

    def _usual_size(self, loader: Any) -> int | None:
        return dataloaders.local_batch_size(loader, self._prepared.num_processes)

    def _describe(self, this: Iteration, batch: Any) -> None:
        """Record the first batch before the script receives it and may change it."""
        if not (this.is_tracked or this.is_part):
            self._logger.describe_dataset(this.loader, "eval", batch)
        this.digest = self._logger.digest_of(batch, "train")

    def _stop_if_signalled(self) -> None:
        """Stop within an evaluation, unless the state at the end of the training iteration cannot be restored."""
        if self._iteration_end is not None:
            signal_number = self._events.stop_signal_in_evaluation()
            if signal_number and self._iteration_end.restore():
                with self._exit_when_stopped():
                    self._events.stop(signal_number)

    def _ended_without_batch(self, this: Iteration) -> None:
        if this.is_tracked and self._events.end_empty_iteration():
            # The run was interrupted after the loader's last batch, so this iteration completes the epoch.
            self._becomes_training(this)
            self._record_training(this)

    def _end_iteration(self, this: Iteration, inner: Any, iterator: Iterator[Any]) -> None:
        self._current = self._inner = None
        if this.is_tracked and this.is_empty and self._events.has_uneven_inputs and self._is_in_train_mode:
            # Other ranks have batches of this iteration.
            self._becomes_training(this)
            self._record_training(this)
        if this.is_training:
            self._events.end_inputs()
            self._ended = this
            self._events.freeze_learning_rates()
        if this.is_tracked:
            self._events.close_iteration(inner, iterator)
        elif this.pending is not None:
            this.pending.discard()
        if this.is_training and self._unreported is None:
            self._events.end_iteration()
            self._keep_iteration_end(this)
        elif this.is_tracked and not this.is_training:
            self._ended = this

    def _keep_iteration_end(self, this: Iteration) -> None:
        content = self._content
        is_alone = self._prepared.num_processes == 1
        if is_alone and content is not None and content.optimizer is not None and not this.has_unreported_work:
            # A scheduler whose state cannot be copied must not end the training.
            with suppress(Exception):
                device = self._logger.accelerator.device
                self._iteration_end = IterationEnd(content, device, this.loader, self._iteration_number)

    def _becomes_training(self, this: Iteration) -> None:
        """Mark an iteration as training, at its first backward or if it is empty on this rank alone."""
        if not this.is_tracked and not this.is_part:
            self._becomes_likely(this)
        this.state, self._epoch = IterationState.TRAINING, EpochState.OPEN
        this.is_in_train_mode = self._is_in_train_mode
        self._events.count_batches(this.num_unreported)

    def _before_forward(self, this: Iteration) -> None:
        """Decide at an observed iteration's first forward whether it is likely to train."""
        assert self._model is not None
        if not torch.is_grad_enabled():
            return  # an evaluation, perhaps within this iteration
        this.remove_hook()
        if this is not self._current or this.is_tracked:
            return
        if self._training.is_likely_at_forward(this.key, is_in_train_mode=self._is_in_train_mode):
            self._becomes_likely(this)
        elif this.pending is not None:
            this.pending.save_buffers(self._model)

    def _becomes_likely(self, this: Iteration) -> None:
        """Track an observed iteration from its first forward or backward on."""
        this.state = IterationState.LIKELY
        # Add the key before the previous epoch ends, whose checkpoint contains how the next one begins.
        self._training.keys.add(this.key)
        self._begin_epoch(this.pending)
        if this.pending is not None:
            self._events.adopt_iteration(this.pending)
        else:
            self._events.begin_inputs(this.loader)

    def _replace(self, this: Iteration, outer: Iteration) -> None:
        """Track an inner iteration, which trains, in place of the outer one."""
        assert this.pending is not None
        self._events.discard_iteration()
        self._events.adopt_iteration(this.pending)
        self._events.count_batches(this.num_unreported - 1)
        this.take_over(outer)
        self._current, self._inner = this, None
        self._report_batch(this, is_last=getattr(this.loader, "end_of_dataloader", False))

    def _record_training(self, this: Iteration) -> None:
        if this.is_recorded:
            return
        this.is_recorded = True
        training = self._training
        if training.keys and not training.has_loader(this.key.number):
            self._messages.say_once("several loaders are trained on: an iteration over any of them counts as an epoch")
        training.keys.add(this.key)
        training.is_in_train_mode = this.is_in_train_mode
        self._logger.describe_dataset(this.loader, "train", this.digest)

    @property
    def _is_in_train_mode(self) -> bool:
        return self._model is None or self._model.training

    # ------------------------------------------------------------------------------ batches and steps

    def _optimizer_stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._steps.is_of_training(optimizer) and (this := self._current or self._ended) is not None:
            this.has_stepped = True

    def _report_batch(self, this: Iteration, *, is_last: bool) -> None:
        self._log_loss(this)
        self._report(this.num_samples, is_last=is_last, is_step=this.take_step())

    def _report(self, num_samples: int, *, is_last: bool, is_step: bool) -> None:
        events = self._events
        if (other := self._steps.other) and not events.has_uneven_inputs:
            self._steps.use_other(other)
        step = events.state.step + is_step if self._steps.are_observed else None
        with self._exit_when_stopped():
            events.batch_done(num_samples, is_loaders_last=is_last, step=step)

    def _log_loss(self, this: Iteration) -> None:
        self._record_training(this)
        if (taken := this.take_loss()) is not None:
            loss, num_samples = taken
            if not num_samples:
                self._messages.say_once(
                    "the number of samples in a batch is not known, so train/loss is the mean over batches, each with "
                    "the same weight; give the batch's class an attribute batch_size",
                    advises=False,
                )
            self._events.log({"train/loss": loss}, num_samples or 1)

    @contextmanager
    def _exit_when_stopped(self) -> Iterator[None]:
        try:
            yield
        except Stopped as error:
            self._listener.fail(error)
            # The script's `except Exception` does not catch SystemExit, and the exit code requeues the job.
            raise SystemExit(EXIT_REQUEUE) from error

    # ------------------------------------------------------------------------------ epochs

    def _begin_epoch(self, pending: PendingIteration | None = None) -> None:
        """Begin an epoch with an iteration that begins now, or with a pending one."""
        self._iteration_end = None
        self._end_epoch(is_last=False, pending=pending)
        self._listener.epoch_begins()
        self._join_of_epoch = self._prepared.join
        self._events.begin_epoch()

    @property
    def _is_in_join_of_epoch(self) -> bool:
        """Whether other ranks may still iterate in this epoch and wait for this rank's gradients."""
        join, is_open = self._prepared.join, self._epoch is EpochState.OPEN
        return join is not None and join is self._join_of_epoch and is_open and self._events.has_uneven_inputs

    def _continue_epoch(self) -> None:
        self._report_rest()
        self._logger.unwatch()
        self._messages.say_once(
            "a join of uneven inputs is around several passes over the data, in which the ranks never reach the end of "
            "the same pass together: they are logged as one epoch without a checkpoint; use a join for each epoch",
            advises=False,
        )

    def _end_epoch(self, *, is_last: bool, pending: PendingIteration | None = None) -> None:
        if self._epoch is not EpochState.OPEN:
            return
        self._report_rest()
        self._ended = None
        self._epoch = EpochState.DONE if is_last else EpochState.BETWEEN
        with self._exit_when_stopped():
            other = self._steps.other
            if self._events.has_uneven_inputs:
                # Another rank may have stepped since.
                self._events.synchronize()
                other = self._events.max_over_ranks(other)
            if other:
                self._steps.use_other(other)
            self._events.end_epoch(is_last=is_last, next_iteration=pending)

    def _report_rest(self) -> None:
        """Report what followed the last batch of an iteration that has ended."""
        if self._unreported is not None:
            (num_samples, is_step), self._unreported = self._unreported, None
            # The script may step for the rest of an accumulation.
            is_step |= self._ended is not None and self._ended.take_step()
            self._report(num_samples, is_last=True, is_step=is_step)
        elif self._ended is not None and self._ended.has_unreported_work:
            self._log_loss(self._ended)
            self._report(0, is_last=True, is_step=self._ended.take_step())
