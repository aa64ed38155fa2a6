"""One training of a script's, from what it has prepared to its end.

prepare    ->  prepared            what went through accelerate
first pass ->  _start              the run, and what a checkpoint is of; where it goes on, state is put back
a pass     ->  iterate             gone by, where it is done; else `Epochs` has it
the end    ->  finish, or fail     the last epoch ends, all is delivered
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from harness.autologging.iterations import IterationKey, TrainedOn
from harness.autologging.observer import Epochs, Original
from harness.autologging.replacements import Replacements
from harness.autologging.replay import Replay
from harness.autologging.run_opener import AutologState, open_run, require_first_optimizer
from harness.autologging.script import Arguments, Prepared, inside
from harness.autologging.script_values import OwnValues
from harness.autologging.settings import AutologSettings
from harness.autologging.user_messages import UserMessages
from harness.data import dataloaders
from harness.errors import CheckpointError, HarnessError, Stopped
from harness.tracking.mlflow.given_run import GivenRun
from harness.training.periodic_logger import PeriodicLogger


class Session:
    """Feeds a `PeriodicLogger` with what a script does.

    Effects: `iterate`, `backward` (see `Epochs`), `finish` and what they lead to are collective, as the script's own
    passes are: every rank makes them alike, in the main thread. The rest is not.

    Args:
        settings: what was asked for.
        arguments: the script's.
        stem: what a made-up name of the run begins with.
        find_given_run: finds the MLflow run that the user has named and that is to be ours; rank zero's.
        failed: called with the MLflow run's id and its status when the training has ended otherwise than well.
        stillness: by which steps and saves of the script's do nothing while epochs go by that are done.
        begins: called when there is a run.

    Attributes:
        notes: for the user, from rank zero, unless tracking is silent.
    """

    def __init__(
        self,
        settings: AutologSettings,
        arguments: Arguments,
        stem: str,
        find_given_run: Callable[[], GivenRun | None],
        failed: Callable[[str | None, str], None],
        stillness: Replacements,
        begins: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.prepared = Prepared()
        self.logger: PeriodicLogger | None = None
        self.memory: AutologState | None = None
        # Of all trainings of the process: several may be in one MLflow run of the script's.
        self.params_of_runs: dict[str, dict[str, str]] = {}
        self._arguments = arguments
        self._stem = stem
        self._find_given_run = find_given_run
        self._failed = failed
        self._stillness = stillness
        self._begins = begins
        self._trained = TrainedOn()
        self._epochs: Epochs | None = None
        self._replay: Replay | None = None
        self._is_over = self._has_failed = False
        # What checkpoints are of; how many of the objects that the script has registered are in them.
        self._checkpointed: tuple[Any, ...] = ()
        self._num_registered = 0
        self.notes = UserMessages(lambda: self.is_rank_zero and not self.settings.tracking.silent)
        self._own = OwnValues()

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
        if self._epochs is not None and self._epochs.is_inner(loader):
            return original(loader)
        return self._iterate(loader, original)

    def _iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        # Not before the first batch is asked for: of two loaders that are iterated over together, it tells which leads.
        could_not_begin = self._epochs is None and self.logger is not None
        if self._is_over or could_not_begin or not self._is_ready():
            yield from original(loader)
            return
        self.prepared.know(loader)
        epochs = self._epochs or self._start()
        self._settle_replay()
        if self._replay is not None and self.is_replaying:
            yield from self._replayed(loader, original, self._replay, epochs.begins_as(loader))
        else:
            yield from epochs.iterate(loader, original)

    def backward(self, accelerator: Accelerator, loss: Any) -> bool:
        """Backward is about to be called; whether it is to be."""
        if accelerator is not self.prepared.accelerator or self._is_over:
            return True
        if self._replay is not None and self.is_replaying:
            self._replay.backward()
            return False
        is_seen = self._epochs is not None and self._epochs.backward(loss)
        if not is_seen and self._epochs is None and self.prepared.models:
            self.notes.say_once("backward is called and no prepared loader is iterated over, so no epoch can be seen")
        return True

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Values that the script logs itself, which are whole. Rank zero's count."""
        if not self.is_replaying:
            self._own.log(values, step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Parameters that the script logs itself."""
        self._own.log_params(values)

    # ---------------------------------------------------------------------- the run begins

    def _is_ready(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self.notes.say_once("a loader is iterated over in another thread, whose passes are not counted")
            return False
        prepared = self.prepared
        return prepared.accelerator is not None and bool(prepared.models and prepared.optimizers)

    def _start(self) -> Epochs:
        prepared = self.prepared
        choice = prepared.choose()
        given = self._find_given_run() if self.is_rank_zero else None
        try:
            logger = open_run(
                self.settings,
                prepared,
                self._arguments,
                params=self._own.early_params,
                stem=self._stem,
                given=given,
                params_of_runs=self.params_of_runs,
            )
        except BaseException:
            # There is no run of ours to fail, and MLflow would call the script's FINISHED.
            self._failed(None if given is None else given.run_id, "FAILED")
            raise
        self.logger = logger
        self._begins()
        self.memory = AutologState(self._trained, prepared)
        logger.register("autolog", self.memory, is_lenient=True)
        self._checkpointed = () if isinstance(choice, str) else (choice.model, choice.optimizer, choice.scheduler)
        self.register_objects()
        if isinstance(choice, str):
            if choice:
                self.notes.say_once(
                    f"{choice}, so it cannot tell which checkpoints are of: there are none, metrics alone"
                )
        else:
            if choice.note:
                self.notes.say_once(choice.note)
            require_first_optimizer(logger.previous_state("autolog"))
            logger.watch(choice.model, choice.optimizer, choice.scheduler)
        self._epochs = Epochs(
            logger,
            prepared,
            self._trained,
            self.memory,
            None if isinstance(choice, str) else choice,
            self._begins_epoch,
            self.fail,
            self.notes,
        )
        self._own.begin(logger)
        if num_done := logger.epoch + (1 if logger.events.loaders_done else 0):
            assert not isinstance(choice, str)
            self._replay = Replay(logger, choice.model, num_done, prepared.loaders)
            self._stillness.put()
            those = "first epoch is done: it goes" if num_done == 1 else f"first {num_done} epochs are done: they go"
            self.notes.say(
                f"harness: the script's {those} by with one batch each, which changes nothing, and what the script "
                "logs or saves through accelerate meanwhile is left out"
            )
        return self._epochs

    def register_objects(self) -> None:
        """What the script has given to `register_for_checkpointing` until now is part of checkpoints."""
        logger, accelerator = self.logger, self.prepared.accelerator
        if logger is None or self._is_over:
            return
        objects = getattr(accelerator, "_custom_objects", [])
        for number in range(self._num_registered, len(objects)):
            name, thing = f"custom_checkpoint_{number}", objects[number]
            if any(thing is each for each in inside(self._checkpointed)):
                continue
            try:
                logger.register(name, thing, is_lenient=True)
            except CheckpointError as error:
                self.notes.say_once(
                    f"{type(thing).__name__}, given to register_for_checkpointing, is left out: {error}"
                )
        self._num_registered = len(objects)

    # ---------------------------------------------------------------------- epochs that are done

    def _begins_epoch(self) -> None:
        """An epoch begins that is not done."""
        if self._replay is not None:
            self._replay.goes_on(self.prepared.loaders)
            self._replay = None

    def _replayed(self, loader: Any, original: Original, replay: Replay, start: IterationKey) -> Iterator[Any]:
        try:
            yield from replay.one_batch(loader, original)
        finally:
            is_likely = self._trained.makes_likely(start)
            if is_likely and self.logger is not None:
                self.logger.events.record_iteration(has_batches=not replay.is_empty)
            is_elsewhere = dataloaders.may_be_uneven(loader, self.prepared.num_processes)
            if replay.is_empty and is_elsewhere and is_likely:
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
            assert self._epochs is not None
            self._replay, self._epochs.is_open = None, True

    # ---------------------------------------------------------------------- the end

    def finish(self) -> None:
        """The script has ended, or is done with this training: the last epoch ends, the run is FINISHED.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        logger, epochs = self.logger, self._epochs
        if self._is_over or logger is None:
            self._over()
            return
        if epochs is None:
            # The script has caught what was raised, and gone on.
            self.fail(HarnessError("the training could not begin"))
            return
        try:
            self._settle_replay()
            epochs.end()
            if self._replay is not None and not self.is_replaying:
                # Nothing was left to train: what the script does next begins with the numbers that it had then.
                logger.events.restore_rng_state()
            self._over()
            logger.close()
        except BaseException as error:
            raise self.fail(error) from error.__cause__

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
        self._replay = None
        self._stillness.take_away()
        if self._epochs is not None:
            self._epochs.close()

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self._is_over

    def say_what_was_not_seen(self) -> None:
        """A line where a script has prepared something, and no training of it was seen."""
        if self.prepared.accelerator is not None and not self._trained.starts:
            lost = "nothing was logged" if self.logger is None else "no loss, no epoch and no checkpoint is in the run"
            self.notes.say_once(f"no pass over a prepared loader with accelerator.backward was seen: {lost}")
