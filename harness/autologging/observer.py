"""A script's passes over its data, told as the epochs and steps of a run.

    a pass begins   the epoch before ends, where this one is likely to train
    backward        the loss; that this pass trains
    a batch is out  the one before is counted: loss, step
    the last end    of the script, or of the training

An epoch is one pass over a loader that is trained on. It ends when the next such pass begins, or the script ends: the
script's evaluation and its scheduler's step come before that, and belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from harness.autologging.iterations import Iteration, IterationKey, TrainedOn
from harness.autologging.optimizer_steps import Steps
from harness.autologging.pass_end import PassEnd
from harness.autologging.run_opener import AutologState
from harness.autologging.script import Choice, Prepared
from harness.autologging.user_messages import UserMessages
from harness.data import dataloaders
from harness.data.pending_iteration import PendingIteration
from harness.errors import EXIT_REQUEUE, Stopped
from harness.training.periodic_logger import PeriodicLogger

Original = Callable[[Any], Iterator[Any]]


class Epochs:
    """Tells a `PeriodicLogger` what happens in a script's passes.

    Effects: `iterate` (as the loader's own iteration, and at the ends of epochs), `backward` and the model's forward (a
    pass's first one may be where an epoch ends), `end` and what they lead to are collective, as the script's own passes
    are: every rank makes them alike, in the main thread. The rest is not.

    Args:
        logger: of the run, which has begun.
        prepared: what the script has prepared.
        trained: which passes train.
        memory: of the run.
        choice: what checkpoints are of; None: there are none.
        begins: called as an epoch begins that is not done.
        fail: called with what stops the run.
        notes: for the user.

    Attributes:
        is_open: whether an epoch has been trained in, and has not ended.
    """

    def __init__(
        self,
        logger: PeriodicLogger,
        prepared: Prepared,
        trained: TrainedOn,
        memory: AutologState,
        choice: Choice | None,
        begins: Callable[[], None],
        fail: Callable[[BaseException], BaseException],
        notes: UserMessages,
    ) -> None:
        self._logger = logger
        self._events = logger.events
        self._prepared = prepared
        self._trained = trained
        self._choice = choice
        self._model: nn.Module | None = None if choice is None else choice.model
        self._begins = begins
        self._fail = fail
        self._notes = notes
        self._steps = Steps(logger, prepared, memory, choice, self._stepped, notes.say_once)
        # The one that is open and trains, or may; the latest that a batch came from.
        self._pass: Iteration | None = None
        self._inner: Any = None
        self.is_open = False
        # Whether nothing was trained since an epoch has ended that was not known to be the last one.
        self._ends_unknown = False
        # What the script was within as the epoch began, by which ranks join the others.
        self._join_of_epoch: Any = None
        # The last pass that trained, or may have: its batches may come to backward when all of them are out.
        self._ended: Iteration | None = None
        # In one process, of the pass that trained last, until more is trained.
        self._pass_end: PassEnd | None = None
        # The number of the pass over its loader as it began, as accelerate counts them.
        self._iteration: int | None = None
        # Samples of a batch at which a pass was left, which is not counted yet; whether the optimizer stepped there.
        self._left: tuple[int, bool] | None = None

    def is_inner(self, loader: Any) -> bool:
        """Whether it is what a pass that is told already iterates over."""
        return loader is self._inner

    def begins_as(self, loader: Any) -> IterationKey:
        """How a pass over a loader begins now."""
        return IterationKey(self._prepared.index_of(loader), self._is_in_train_mode)

    def iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        """A pass over a loader: its batches, as the script would have had them."""
        running, trained = self._pass, self._trained
        if running is None:
            return self._pass_over(loader, original)
        # A pass as those that have trained takes the place of one that has not.
        is_known = bool(trained.starts) and trained.makes_likely(self.begins_as(loader))
        if running.is_training or (running.may_lead(loader) and not is_known):
            return self._within(loader, original, running)
        return self._pass_over(loader, original)

    def backward(self, loss: Any) -> bool:
        """Backward is about to be called; whether there is a pass that it is of."""
        this = self._pass or self._ended
        if this is None:
            return False
        self._pass_end = None
        if not this.is_training:
            self._is_training_after_all(this)
            if this is self._ended:
                self._events.end_inputs()  # all its batches were fetched before
                self._events.end_iteration()
        this.backward(loss)
        if this is self._ended:
            self._has_trained(this)
        return True

    def end(self) -> None:
        """The training is over: the last epoch ends."""
        this = self._pass
        if this is None or not this.is_training:
            if self.is_open:
                self._end_epoch(is_last=True)
            elif self._ends_unknown:
                self._events.end_training()
            return
        # An iterator that is still there: it would go on within the epoch.
        if this.has_news:
            self._batch_done(this, is_last=False)
        self._pass = self._inner = None
        self._events.end_epoch(is_whole=False, is_last=True)

    def close(self) -> None:
        """Nothing more is told."""
        self._pass = self._inner = self._ended = None
        self._steps.close()

    # ---------------------------------------------------------------------- one pass

    def _pass_over(self, loader: Any, original: Original) -> Iterator[Any]:
        start = self.begins_as(loader)
        is_likely = self._trained.makes_likely(start)
        is_part = is_likely and self._is_within_one_join
        before = self._pass
        this = Iteration(loader, start, self._usual_size(loader), is_likely=is_likely and not is_part, is_part=is_part)
        self._pass = this
        self._iteration = getattr(loader, "iteration", None)
        ended = self._ended
        if (before is not None and before.is_likely) or (ended is not None and not ended.is_training):
            # Nothing came of it, be its iterator still there, or its batches all out.
            self._events.discard_iteration()
            self._ended = None
        if is_part:
            self._go_on_in_epoch()
            return self._go_through(this, loader, original(loader))
        if this.is_likely:
            self._begin_epoch()
            self._inner = loader
            inner, iterator = self._events.begin_iteration(loader)
            self._inner = inner
            return self._go_through(this, inner, iterator)
        if torch.is_grad_enabled():
            this.heard = self._events.observe_iteration(loader)
            if self._model is not None:
                # Ahead of FSDP's own, which makes parameters whole.
                this.hook = self._model.register_forward_pre_hook(lambda *_: self._forward_comes(this), prepend=True)
        return self._go_through(this, loader, original(loader))

    def _within(self, loader: Any, original: Original, running: Iteration) -> Iterator[Any]:
        """Within a pass that trains, or may: an evaluation, or a second loader beside the one that is counted."""
        this = Iteration(loader, self.begins_as(loader), self._usual_size(loader), is_likely=False)
        running.is_crossed |= loader is running.loader
        if not running.is_training:
            this.heard = self._events.observe_iteration(loader)
        return self._go_through(this, loader, original(loader), running)

    def _go_through(
        self, this: Iteration, inner: Any, iterator: Iterator[Any], running: Iteration | None = None
    ) -> Iterator[Any]:
        try:
            for batch in iterator:
                if this.is_empty:
                    self._describe(this, batch)
                this.batch_is_out(batch)
                if this is self._pass:
                    self._events.record_iteration(has_batches=True)
                    # From here on another pass over the same loader is the script's.
                    self._inner = None
                yield batch
                if this.is_training and this is self._pass:
                    is_last = not this.is_crossed and getattr(inner, "end_of_dataloader", False)
                    self._batch_done(this, is_last=is_last)
                    continue
                this.num_seen += 1
                if running is None and self._pass_end is not None and not this.is_likely:
                    signal_number = self._events.stop_signal_in_evaluation()
                    # Where the state of the pass's end cannot be put back, the evaluation goes on.
                    if signal_number and self._pass_end.put_back():
                        with self._stopping():
                            self._events.stop(signal_number)
                if running is not None and running is self._pass and this.leads_over(running):
                    self._leads(this, running)
            if this is self._pass and this.is_empty:
                self._is_over_without_batch(this)
        except GeneratorExit:
            if this is self._pass and this.is_training and this.has_news:
                # Counting it is collective, for which this is no place: it comes with the epoch's end.
                self._log_loss(this)
                self._left = (this.num_samples, this.take_step())
            raise
        finally:
            this.forget_hook()
            if this is self._pass:
                self._leave(this, inner, iterator)
            elif this.heard is not None:
                this.heard.discard()
            if running is not None and running is self._pass:
                self._events.restart_step_timer()

    def _usual_size(self, loader: Any) -> int | None:
        return dataloaders.local_batch_size(loader, self._prepared.num_processes)

    def _describe(self, this: Iteration, batch: Any) -> None:
        """The first batch of a pass, before the script has it: by the time the pass trains, it may have changed."""
        if not (this.is_likely or this.is_part):
            self._logger.describe_dataset(this.loader, "eval", batch)
        this.digest = self._logger.digest_of(batch, "train")

    def _is_over_without_batch(self, this: Iteration) -> None:
        if this.is_likely and self._events.end_empty_iteration():
            # Cut off behind what is the loader's last batch now. It was this epoch's pass, and the next one is not.
            self._is_training_after_all(this)
            self._has_trained(this)

    def _leave(self, this: Iteration, inner: Any, iterator: Iterator[Any]) -> None:
        self._pass = self._inner = None
        if this.is_likely and this.is_empty and self._events.has_uneven_inputs and self._is_in_train_mode:
            # On other ranks: this one has no batch of it.
            self._is_training_after_all(this)
            self._has_trained(this)
        if this.is_training:
            self._events.end_inputs()
            self._ended = this
            self._events.freeze_learning_rates()
        if this.is_likely:
            self._events.close_iteration(inner, iterator)
        elif this.heard is not None:
            this.heard.discard()
        if this.is_training and self._left is None:
            self._events.end_iteration()
            self._keep_pass_end(this)
        elif this.is_likely and not this.is_training:
            self._ended = this

    def _keep_pass_end(self, this: Iteration) -> None:
        choice = self._choice
        is_alone = self._prepared.num_processes == 1
        if is_alone and choice is not None and choice.optimizer is not None and not this.has_news:
            # A scheduler whose state cannot be copied is no reason to end the training.
            with suppress(Exception):
                self._pass_end = PassEnd(choice, self._logger.accelerator.device, this.loader, self._iteration)

    def _batch_done(self, this: Iteration, *, is_last: bool) -> None:
        self._log_loss(this)
        self._count(this.num_samples, is_last=is_last, is_step=this.take_step())

    def _count(self, num_samples: int, *, is_last: bool, is_step: bool) -> None:
        events = self._events
        if (another := self._steps.another) and not events.has_uneven_inputs:
            self._steps.attend(another)
        step = events.state.step + is_step if self._steps.are_seen else None
        with self._stopping():
            events.batch_done(num_samples, is_loaders_last=is_last, step=step)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except Stopped as error:
            self._fail(error)
            # No `except Exception` of the script's keeps it from ending, and its code is the one to be requeued with.
            raise SystemExit(EXIT_REQUEUE) from error

    def _log_loss(self, this: Iteration) -> None:
        self._has_trained(this)
        if (taken := this.take_loss()) is not None:
            loss, num_samples = taken
            if not num_samples:
                self._notes.say_once(
                    "the number of samples in a batch is not known, so train/loss is a mean of the batches' means, in "
                    "which each batch counts alike; give the batch's class an attribute batch_size",
                    advises=False,
                )
            self._events.log({"train/loss": loss}, num_samples or 1)

    def _is_training_after_all(self, this: Iteration) -> None:
        """The first backward of a pass; or of one that other ranks have batches of, and this one has none."""
        if not this.is_likely and not this.is_part:
            self._becomes_likely(this)
        this.is_training = self.is_open = True
        self._ends_unknown = False
        this.is_in_train_mode = self._is_in_train_mode
        self._events.count_batches(this.num_seen)

    def _forward_comes(self, this: Iteration) -> None:
        """The first forward of a pass that has not begun as training does."""
        assert self._model is not None
        if not torch.is_grad_enabled():
            return  # an evaluation, which may be one within this pass
        this.forget_hook()
        if this is not self._pass or this.is_likely:
            return
        if self._trained.makes_likely_now(this.start, is_in_train_mode=self._is_in_train_mode):
            self._becomes_likely(this)
        elif this.heard is not None:
            this.heard.save_buffers(self._model)

    def _becomes_likely(self, this: Iteration) -> None:
        """A pass that did not begin as training is, before anything has come of it but batches, or a forward."""
        this.is_likely = True
        # Before the epoch ends: its checkpoint says how the next one begins.
        self._trained.starts.add(this.start)
        self._begin_epoch(this.heard)
        if this.heard is not None:
            self._events.adopt_iteration(this.heard)
        else:
            self._events.begin_inputs(this.loader)

    def _leads(self, this: Iteration, running: Iteration) -> None:
        """Of two passes, the one within the other is trained on."""
        assert this.heard is not None
        self._events.discard_iteration()
        self._events.adopt_iteration(this.heard)
        self._events.count_batches(this.num_seen - 1)
        this.take_over(running)
        self._pass, self._inner = this, None
        self._batch_done(this, is_last=getattr(this.loader, "end_of_dataloader", False))

    def _has_trained(self, this: Iteration) -> None:
        """A batch of a pass was trained on, and it is this pass's."""
        if this.is_known:
            return
        this.is_known = True
        trained = self._trained
        if trained.starts and this.start.number not in trained.numbers:
            self._notes.say_once("several loaders are trained on: a pass over any of them counts as an epoch")
        trained.starts.add(this.start)
        trained.is_in_train_mode = this.is_in_train_mode
        self._logger.describe_dataset(this.loader, "train", this.digest)

    @property
    def _is_in_train_mode(self) -> bool:
        return self._model is None or self._model.training

    def _stepped(self) -> None:
        if (this := self._pass or self._ended) is not None:
            this.has_stepped = True

    # ---------------------------------------------------------------------- epochs

    def _begin_epoch(self, behind: PendingIteration | None = None) -> None:
        """An epoch begins: with a pass that begins now, or that has begun already, as was overheard."""
        self._pass_end = None
        self._end_epoch(is_last=False, behind=behind)
        self._begins()
        self._join_of_epoch = self._prepared.join
        self._events.begin_epoch()

    @property
    def _is_within_one_join(self) -> bool:
        """Whether other ranks may still be in a pass of this epoch, and wait there for this one's gradients."""
        join = self._prepared.join
        return join is not None and join is self._join_of_epoch and self.is_open and self._events.has_uneven_inputs

    def _go_on_in_epoch(self) -> None:
        self._count_rest()
        self._logger.unwatch()
        self._notes.say_once(
            "a join of uneven inputs is around several passes over the data, within which the ranks are never at the "
            "end of the same one: they are logged as one epoch, and no checkpoint is made; make it anew for each epoch",
            advises=False,
        )

    def _end_epoch(self, *, is_last: bool, behind: PendingIteration | None = None) -> None:
        if not self.is_open:
            return
        self._count_rest()
        self._ended = None
        self.is_open, self._ends_unknown = False, not is_last
        with self._stopping():
            another = self._steps.another
            if self._events.has_uneven_inputs:
                # A rank may have had no step since.
                self._events.synchronize()
                another = self._events.max_over_ranks(another)
            if another:
                self._steps.attend(another)
            self._events.end_epoch(is_last=is_last, next_iteration=behind)

    def _count_rest(self) -> None:
        """Of a pass that is over, what came behind its last batch."""
        if self._left is not None:
            (num_samples, is_step), self._left = self._left, None
            # A script may step for what is left of an accumulation.
            is_step |= self._ended is not None and self._ended.take_step()
            self._count(num_samples, is_last=True, is_step=is_step)
        elif self._ended is not None and self._ended.has_news:
            self._log_loss(self._ended)
            self._count(0, is_last=True, is_step=self._ended.take_step())
