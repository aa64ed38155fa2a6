"""One training of a script's, from what it has prepared to its end.

    prepare    ->  prepared            what went through accelerate
    first pass ->  _start              the run, and what a checkpoint is of; where it goes on, state is put back
    a pass     ->  iterate             the epoch before ends; batches are counted
    backward   ->  backward            the loss; that this pass trains
    the end    ->  finish, or fail     the last epoch ends, all is delivered

An epoch is one pass over a loader that is trained on. It ends when the next such pass begins, or the script ends: the
script's evaluation and its scheduler's step come before that, and belong to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness import data
from harness.autologging.opening import Memory, open_run, require_first_optimizer
from harness.autologging.own_values import OwnValues
from harness.autologging.passes import Pass, Start, TrainedOn
from harness.autologging.replacing import Replacements
from harness.autologging.replay import Replay
from harness.autologging.script import Arguments, Prepared, raw
from harness.autologging.settings import Settings
from harness.errors import EXIT_REQUEUE, Stopped
from harness.events import LoopEvents
from harness.overheard import Overheard
from harness.periodic import PeriodicLogger
from harness.progress import Progress

Original = Callable[[Any], Iterator[Any]]


class Session:
    """Feeds a `PeriodicLogger` with what a script does.

    Effects: `iterate` (as the loader's own iteration, and at the ends of epochs), `finish` and what they lead to are
    collective, as the script's own passes are: every rank makes them alike, in the main thread. The rest is not.

    Args:
        settings: what was asked for.
        arguments: the script's.
        stem: what a made-up name of the run begins with.
        active_run_id: gives the id of an MLflow run that the script has made and that is to be ours; rank zero's.
        failed: called with the MLflow run's id and its status when the training has ended otherwise than well.
        stillness: by which steps and saves of the script's do nothing while epochs go by that are done.
        begins: called when there is a run.
    """

    def __init__(
        self,
        settings: Settings,
        arguments: Arguments,
        stem: str,
        active_run_id: Callable[[], str | None],
        failed: Callable[[str | None, str], None],
        stillness: Replacements,
        begins: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.prepared = Prepared()
        self.logger: PeriodicLogger | None = None
        self.memory: Memory | None = None
        # Of all trainings of the process: several may be in one MLflow run of the script's.
        self.params_of_runs: dict[str, dict[str, str]] = {}
        self._arguments = arguments
        self._stem = stem
        self._active_run_id = active_run_id
        self._failed = failed
        self._stillness = stillness
        self._begins = begins
        self._model: nn.Module | None = None
        self._trained = TrainedOn()
        self._replay: Replay | None = None
        # The one that is open and trains, or may; the latest that a batch came from.
        self._pass: Pass | None = None
        self._inner: Any = None
        self._is_epoch_open = False
        # What the script is within by which ranks join the others, and what it was within when the epoch began.
        self.join: Any = None
        self._join_of_epoch: Any = None
        # The last pass that trained: its last batch may come to backward when all of its batches are out.
        self._ended: Pass | None = None
        # Samples of a batch at which a pass was left, which is not counted yet; whether the optimizer stepped there.
        self._left: tuple[int, bool] | None = None
        self._is_over = self._has_failed = False
        self._said: set[str] = set()
        self._own = OwnValues(lambda what: self._say_once(what, advises=False))
        self._hook: Any = None
        # An optimizer that is not torch's tells nobody.
        self._sees_steps = False
        # Those that checkpoints were of, in order; the one that has stepped in place of the last one.
        self._optimizers: list[Any] = []
        self._another: Any = None

    @property
    def has_begun(self) -> bool:
        """Whether there is a run."""
        return self.logger is not None

    @property
    def is_replaying(self) -> bool:
        """Whether epochs go by that are done already."""
        return self._replay is not None and self._replay.num_left > 0

    @property
    def is_behind_what_is_done(self) -> bool:
        """Whether the first pass has begun that is not done, or nothing was."""
        return self._replay is None

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank is the one that logs."""
        accelerator = self.prepared.accelerator
        return accelerator is None or bool(accelerator.process_index == 0)

    # ---------------------------------------------------------------------- what the script does

    def iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        """A pass over a loader: its batches, as the script would have had them."""
        if loader is self._inner:
            return original(loader)
        return self._iterate(loader, original)

    def _iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        # Not before the first batch is asked for: of two loaders that are iterated over together, it tells which leads.
        if self._is_over or not self._is_ready():
            yield from original(loader)
            return
        self.prepared.know(loader)
        if self.logger is None:
            self._start()
        self._settle_replay()
        if self.is_replaying:
            yield from self._replayed(loader, original)
        elif (running := self._pass) is not None and (running.is_training or running.may_lead(loader)):
            yield from self._within(loader, original, running)
        else:
            yield from self._pass_over(loader, original)

    def backward(self, accelerator: Accelerator, loss: Any) -> bool:
        """Backward is about to be called; whether it is to be."""
        if accelerator is not self.prepared.accelerator or self._is_over:
            return True
        if self._replay is not None and self.is_replaying:
            self._replay.backward()
            return False
        this = self._pass or self._ended
        if this is None:
            if self.logger is None and self.prepared.models:
                self._say_once("backward is called and no prepared loader is iterated over, so no epoch can be seen")
            return True
        if not this.is_training:
            self._is_training_after_all(this)
            if this is self._ended:
                self._events.end_pass()  # all its batches were fetched before
                self._events.end_data()
        this.backward(loss)
        if this is self._ended:
            self._has_trained(this)
        return True

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Values that the script logs itself, which are whole. Rank zero's count."""
        if not self.is_replaying:
            self._own.log(values, step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters that the script logs itself."""
        self._own.log_params(values)

    @property
    def _events(self) -> LoopEvents:
        """Of the run, which has begun."""
        assert self.logger is not None
        return self.logger.events

    # ---------------------------------------------------------------------- the run begins

    def _is_ready(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self._say_once("a loader is iterated over in another thread, whose passes are not counted")
            return False
        prepared = self.prepared
        return prepared.accelerator is not None and bool(prepared.models and prepared.optimizers)

    def _start(self) -> None:
        prepared = self.prepared
        choice = prepared.choose()
        active_run_id = self._active_run_id() if self.is_rank_zero else None
        try:
            logger = open_run(
                self.settings,
                prepared,
                self._arguments,
                params=self._own.early_params,
                stem=self._stem,
                mlflow_run_id=active_run_id,
                params_of_runs=self.params_of_runs,
            )
        except BaseException:
            # There is no run of ours to fail, and MLflow would call the script's FINISHED.
            self._failed(active_run_id, "FAILED")
            raise
        self.logger = logger
        self._begins()
        self.memory = Memory(self._trained, prepared)
        logger.register("autolog", self.memory)
        if isinstance(choice, str):
            if choice:
                self._say_once(f"{choice}, so it cannot tell which checkpoints are of: there are none, metrics alone")
        else:
            self._model = choice.model
            if choice.note:
                self._say_once(choice.note)
            require_first_optimizer(logger.state_before("autolog"))
            logger.watch(choice.model, choice.optimizer, choice.scheduler)
            self._optimizers = [] if choice.optimizer is None else [raw(choice.optimizer)]
        # Of all optimizers alike: one that is wrapped, or steps within backward, too.
        self._hook = register_optimizer_step_post_hook(self._stepped)
        self._sees_steps = isinstance(raw(prepared.optimizers[0]), torch.optim.Optimizer)
        self._own.begin(logger)
        if num_done := logger.epoch + (1 if self._events.loaders_done else 0):
            assert self._model is not None
            self._replay = Replay(logger, self._model, num_done)
            self._stillness.put()
            those = "first epoch is done: it goes" if num_done == 1 else f"first {num_done} epochs are done: they go"
            self._say(
                f"harness: the script's {those} by with one batch each, which changes nothing, and what the script "
                "logs or saves through accelerate meanwhile is left out"
            )

    # ---------------------------------------------------------------------- one pass

    def _pass_over(self, loader: Any, original: Original) -> Iterator[Any]:
        logger = self.logger
        assert logger is not None
        start = Start(self.prepared.index_of(loader), self._is_in_train_mode)
        is_likely = self._trained.makes_likely(start)
        is_part = is_likely and self._is_within_one_join
        before, this = self._pass, Pass(loader, start, is_likely=is_likely and not is_part, is_part=is_part)
        self._pass = this
        ended = self._ended
        if (before is not None and before.is_likely) or (ended is not None and not ended.is_training):
            # Nothing came of it, be its iterator still there, or its batches all out.
            self._events.forget_data()
            self._ended = None
        if is_part:
            self._go_on_in_epoch()
            return self._go_through(this, loader, original(loader))
        if this.is_likely:
            self._begin_epoch()
            self._inner = loader
            inner, iterator = self._events.begin_data(loader)
            self._inner = inner
            return self._go_through(this, inner, iterator)
        logger.describe_dataset(loader, "eval")
        if torch.is_grad_enabled():
            this.heard = self._events.overhear(loader)
            if self._model is not None:
                this.hook = self._model.register_forward_pre_hook(lambda *_: self._forward_comes(this))
        return self._go_through(this, loader, original(loader))

    def _within(self, loader: Any, original: Original, running: Pass) -> Iterator[Any]:
        """Within a pass that trains, or may: an evaluation, or a second loader beside the one that is counted."""
        assert self.logger is not None
        self.logger.describe_dataset(loader, "eval")
        this = Pass(loader, Start(self.prepared.index_of(loader), self._is_in_train_mode), is_likely=False)
        if not running.is_training:
            this.heard = self._events.overhear(loader)
        return self._go_through(this, loader, original(loader), running)

    def _go_through(
        self, this: Pass, inner: Any, iterator: Iterator[Any], running: Pass | None = None
    ) -> Iterator[Any]:
        try:
            for batch in iterator:
                this.batch_is_out(batch)
                yield batch
                if this.is_training:
                    self._batch_done(this, is_last=getattr(inner, "end_of_dataloader", False))
                    continue
                this.num_seen += 1
                if running is not None and running is self._pass and this.leads_over(running):
                    self._leads(this, running)
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
                this.heard.leave()
            if running is not None and not self._is_over:
                self._events.skip_time()

    def _leave(self, this: Pass, inner: Any, iterator: Iterator[Any]) -> None:
        self._pass = self._inner = None
        if this.is_likely and this.is_empty and self._events.may_differ and self._is_in_train_mode:
            # On other ranks: this one has no batch of it.
            self._is_training_after_all(this)
            self._has_trained(this)
        if this.is_training:
            self._events.end_pass()
            self._ended = this
            self._events.keep_learning_rates()
        if this.is_likely:
            self._events.leave_data(inner, iterator)
        elif this.heard is not None:
            this.heard.leave()
        if this.is_training and self._left is None:
            self._events.end_data()
        elif this.is_likely and not this.is_training:
            self._ended = this

    def _batch_done(self, this: Pass, *, is_last: bool) -> None:
        self._log_loss(this)
        self._count(this.num_samples, is_last=is_last, is_step=this.take_step())

    def _watch_another(self) -> None:
        """The script steps with an optimizer that it has prepared since: checkpoints are of that one."""
        assert self.logger is not None
        optimizer, self._another = self._another, None
        number = self.prepared.number_of(optimizer)
        assert number is not None
        if optimizer in self._optimizers:
            self._optimizers.clear()
            self.logger.watch_instead(None)
            self._say_once("several optimizers step in turn for the one model: checkpoints hold the model alone")
            return
        self._optimizers.append(optimizer)
        assert self.memory is not None
        self.memory.optimizer = number
        self.logger.watch_instead(self.prepared.optimizers[number], self.prepared.scheduler_of(optimizer))
        self._say_once(
            f"another optimizer steps from here on ({type(optimizer).__name__}): checkpoints hold its state, and a run "
            "cannot go on from them"
        )

    def _count(self, num_samples: int, *, is_last: bool, is_step: bool) -> None:
        events = self._events
        if self._another is not None and not events.may_differ:
            self._watch_another()
        step = events.place.step + is_step if self._sees_steps else None
        with self._stopping():
            events.batch_done(num_samples, is_loaders_last=is_last, step=step)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except Stopped as error:
            self.fail(error)
            # No `except Exception` of the script's keeps it from ending, and its code is the one to be requeued with.
            raise SystemExit(EXIT_REQUEUE) from error

    def _log_loss(self, this: Pass) -> None:
        self._has_trained(this)
        if (taken := this.take_loss()) is not None:
            loss, num_samples = taken
            self._events.log({"train/loss": loss}, num_samples or 1)

    def _is_training_after_all(self, this: Pass) -> None:
        """The first backward of a pass; or of one that other ranks have batches of, and this one has none."""
        if not this.is_likely and not this.is_part:
            self._becomes_likely(this)
        this.is_training = self._is_epoch_open = True
        this.is_in_train_mode = self._is_in_train_mode
        self._events.count_data(this.num_seen)

    def _forward_comes(self, this: Pass) -> None:
        """The first forward of a pass that has not begun as training does."""
        assert self._model is not None
        this.forget_hook()
        if this is not self._pass or this.is_likely or not torch.is_grad_enabled():
            return
        if self._trained.makes_likely_now(this.start, is_in_train_mode=self._is_in_train_mode):
            self._becomes_likely(this)
        elif this.heard is not None:
            this.heard.keep_buffers(self._model)

    def _becomes_likely(self, this: Pass) -> None:
        """A pass that did not begin as training is, before anything has come of it but batches, or a forward."""
        this.is_likely = True
        # Before the epoch ends: its checkpoint says how the next one begins.
        self._trained.starts.add(this.start)
        self._begin_epoch(this.heard)
        if this.heard is not None:
            self._events.adopt_data(this.heard)
        else:
            self._events.begin_pass(this.loader)

    def _leads(self, this: Pass, running: Pass) -> None:
        """Of two passes, the one within the other is trained on."""
        assert this.heard is not None
        self._events.forget_data()
        self._events.adopt_data(this.heard)
        self._events.count_data(this.num_seen - 1)
        this.take_over(running)
        self._pass, self._inner = this, None
        self._batch_done(this, is_last=getattr(this.loader, "end_of_dataloader", False))

    def _has_trained(self, this: Pass) -> None:
        """A batch of a pass was trained on, and it is this pass's."""
        if this.is_known:
            return
        this.is_known = True
        assert self.logger is not None
        trained = self._trained
        if trained.starts and this.start.number not in trained.numbers:
            self._say_once("several loaders are trained on: a pass over any of them counts as an epoch")
        trained.starts.add(this.start)
        trained.is_in_train_mode = this.is_in_train_mode
        self.logger.describe_dataset(this.loader, "train")

    @property
    def _is_in_train_mode(self) -> bool:
        return self._model is None or self._model.training

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if (this := self._pass or self._ended) is not None:
            this.has_stepped = True
        if self._optimizers and optimizer is not self._optimizers[-1] and self.prepared.steps(optimizer, self._model):
            self._another = optimizer

    # ---------------------------------------------------------------------- epochs

    def _begin_epoch(self, behind: Overheard | None = None) -> None:
        """An epoch begins: with a pass that begins now, or that has begun already, as was overheard."""
        self._end_epoch(is_last=False, behind=behind)
        if self._replay is not None:
            self._replay.goes_on(self.prepared.loaders)
            self._replay = None
        self._join_of_epoch = self.join
        self._events.begin_epoch()

    @property
    def _is_within_one_join(self) -> bool:
        """Whether other ranks may still be in a pass of this epoch, and wait there for this one's gradients."""
        is_same = self.join is not None and self.join is self._join_of_epoch
        return is_same and self._is_epoch_open and self._events.may_differ

    def _go_on_in_epoch(self) -> None:
        assert self.logger is not None
        self._count_rest()
        self.logger.unwatch()
        self._say_once(
            "a join of uneven inputs is around several passes over the data, within which the ranks are never at the "
            "end of the same one: they are logged as one epoch, and no checkpoint is made; make it anew for each epoch",
            advises=False,
        )

    def _end_epoch(self, *, is_last: bool, behind: Overheard | None = None) -> None:
        if not self._is_epoch_open:
            return
        self._count_rest()
        self._ended = None
        self._is_epoch_open = False
        with self._stopping():
            if self._another is not None:
                self._events.meet()
                self._watch_another()
            self._events.end_epoch(is_last=is_last, behind=behind)

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

    def _replayed(self, loader: Any, original: Original) -> Iterator[Any]:
        replay, start = self._replay, Start(self.prepared.index_of(loader), self._is_in_train_mode)
        assert replay is not None
        try:
            yield from replay.one_batch(loader, original)
        finally:
            is_elsewhere = data.may_be_uneven(loader, self.prepared.num_processes)
            if replay.is_empty and is_elsewhere and self._trained.makes_likely(start):
                replay.backward()  # on other ranks: this one has no batch of it
            self._settle_replay()

    def _settle_replay(self) -> None:
        """A pass went by: if it trained, one less is to come."""
        if self._replay is None or (loader := self._replay.take_trained()) is None:
            return
        is_end_to_come = self._replay.pass_done(loader)
        if not self.is_replaying:
            # What the script does behind its last epoch is done.
            self._stillness.take_away()
        if is_end_to_come:
            # Cut off between an epoch's last step and its end: what comes now is that end.
            self._replay = None
            self._is_epoch_open = True

    # ---------------------------------------------------------------------- the end

    def finish(self) -> None:
        """The script has ended, or is done with this training: the last epoch ends, the run is FINISHED.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        logger = self.logger
        if self._is_over or logger is None:
            self._over()
            return
        try:
            self._settle_replay()
            self._end_training()
            self._over()
            logger.close()
        except BaseException as error:
            raise self.fail(error) from error.__cause__

    def _end_training(self) -> None:
        this = self._pass
        if this is not None and this.is_training:
            # An iterator that is still there: it would go on within the epoch.
            if this.has_news:
                self._batch_done(this, is_last=False)
            self._pass = self._inner = None
            self._events.end_epoch(is_whole=False, is_last=True)
        else:
            self._end_epoch(is_last=True)
            if self._replay is not None and not self.is_replaying:
                # Nothing was left to train: what the script does next begins with the numbers that it had then.
                self._events.put_back_random()

    def fail(self, error: BaseException) -> BaseException:
        """The script has failed; returns what really ended it: another rank's failure, where this is its echo."""
        logger = self.logger
        has_ended, self._has_failed = self._has_failed or (self._is_over and logger is None), True
        self._over()
        if logger is None or has_ended:
            return error
        cause = logger.fail(error)
        was_asked = isinstance(cause, (Stopped, KeyboardInterrupt))
        self._failed(logger.mlflow_run_id, "KILLED" if was_asked else "FAILED")
        return cause

    def leave(self) -> None:
        """In a child of the process that it runs in: nothing of it is the child's."""
        self._over()

    def _over(self) -> None:
        self._is_over = True
        self._pass = self._inner = self._ended = self._replay = None
        self._stillness.take_away()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._is_over

    def say_what_was_not_seen(self) -> None:
        """A line where a script has prepared something, and no training of it was seen."""
        if self.prepared.accelerator is not None and not self._trained.starts:
            lost = "nothing was logged" if self.logger is None else "no loss, no epoch and no checkpoint is in the run"
            self._say_once(f"no pass over a prepared loader with accelerator.backward was seen: {lost}")

    def _say(self, line: str) -> None:
        if self.is_rank_zero and not self.settings.tracking.silent:
            Progress(enabled=False).say(line)

    def _say_once(self, what: str, *, advises: bool = True) -> None:
        if what not in self._said:
            self._said.add(what)
            advice = (
                "; with PeriodicLogger(accelerator), its watch(model, optimizer), epochs(n) and batches(loader) you "
                "say it yourself"
            )
            self._say(f"harness: autolog: {what}{advice if advises else ''}")
