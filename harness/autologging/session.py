"""Log one training of a script, from `Accelerator.prepare` to its end.

prepare          prepared            collects the script's prepared objects
first iteration  iterate             opens the run; a resumed run restores its state
an iteration     iterate             is replayed if its epoch is complete; otherwise the `EpochObserver` reports it
the end          finish, fail        ends the last epoch and the run
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import Accelerator

from harness.autologging.autolog_state import AutologState, require_first_optimizer
from harness.autologging.context import AutologContext, UserMessages
from harness.autologging.iterations import IterationKey, TrainingIterations
from harness.autologging.observer import EpochObserver, Original
from harness.autologging.replay import Replay
from harness.autologging.run_opener import ScriptValues, end_active_run, open_run
from harness.autologging.script import CheckpointContent, Prepared, with_unwrapped
from harness.autologging.settings import AutologSettings, run_record
from harness.data import dataloaders
from harness.errors import CheckpointError, HarnessError, Stopped
from harness.training.periodic_logger import PeriodicLogger


class Session:
    """Logs one training.

    Effects: `iterate`, `backward` (see `EpochObserver`), `finish` and `fail` are collective, as the script's own
    iterations are: every rank calls them alike, in the main thread. The rest is not.

    Attributes:
        prepared: the script's prepared objects.
        logger: None until the run is open.
        state: autologging's state in the run; None until the run is open.
        is_over: whether the training has ended.
    """

    def __init__(self, context: AutologContext, settings: AutologSettings) -> None:
        self.settings = settings
        self.prepared = Prepared()
        self.messages = UserMessages(self.prepared, is_silent=settings.tracking.silent)
        self.logger: PeriodicLogger | None = None
        self.state: AutologState | None = None
        self.is_over = False
        self._context = context
        self._values = ScriptValues()
        self._training = TrainingIterations()
        self._observer: EpochObserver | None = None
        self._replay: Replay | None = None
        self._has_failed = False
        # The objects in checkpoints, and the number of the script's registered objects that were processed.
        self._checkpointed: tuple[Any, ...] = ()
        self._num_registered = 0

    def change(self, settings: AutologSettings) -> None:
        """Change the settings, before the run is open."""
        self.settings, self.messages.is_silent = settings, settings.tracking.silent

    @property
    def has_begun(self) -> bool:
        """Whether the run is or was open."""
        return self.logger is not None

    @property
    def is_running(self) -> bool:
        """Whether the run is open now."""
        return self.logger is not None and not self.is_over

    @property
    def is_replaying(self) -> bool:
        """Whether the script repeats completed epochs."""
        return self._replay is not None and self._replay.num_left > 0

    @property
    def is_past_replay(self) -> bool:
        """Whether a new epoch has begun since the run was resumed; True for a new run."""
        return self._replay is None

    # ------------------------------------------------------------------------------ events of the script

    def iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        """Iterate over a loader: the same batches as without autologging, or one batch in a replay."""
        if self._observer is not None and self._observer.is_inner(loader):
            return original(loader)
        return self._iterate(loader, original)

    def _iterate(self, loader: Any, original: Original) -> Iterator[Any]:
        # Runs at the first batch: of two loaders that are iterated over together, the first to yield counts.
        could_not_begin = self._observer is None and self.logger is not None
        if self.is_over or could_not_begin or not self._is_ready():
            yield from original(loader)
            return
        self.prepared.add_loader(loader)
        observer = self._observer or self._start()
        self._end_replayed_iteration()
        if self._replay is not None and self.is_replaying:
            yield from self._replayed(loader, original, self._replay, observer.key_of(loader))
        else:
            yield from observer.iterate(loader, original)

    def backward(self, accelerator: Accelerator, loss: Any) -> bool:
        """Observe a call of backward; returns False if it must be skipped, in a replay."""
        if accelerator is not self.prepared.accelerator or self.is_over:
            return True
        if self._replay is not None and self.is_replaying:
            self._replay.backward()
            return False
        is_observed = self._observer is not None and self._observer.backward(loss)
        if not is_observed and self._observer is None and self.prepared.models:
            self.messages.say_once("backward is called outside of any prepared loader, so no epoch can be observed")
        return True

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Record metrics that the script logs itself, from rank 0."""
        if not self.is_replaying:
            self._values.log(values, step)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Record parameters that the script logs itself."""
        self._values.log_params(values)

    # ------------------------------------------------------------------------------ the run opens

    def _is_ready(self) -> bool:
        if threading.current_thread() is not threading.main_thread():
            self.messages.say_once("a loader is iterated over in another thread: these iterations are not counted")
            return False
        prepared = self.prepared
        return prepared.accelerator is not None and bool(prepared.models and prepared.optimizers)

    def _start(self) -> EpochObserver:
        prepared, settings, resume_from = self.prepared, self.settings, self._context.settings.resume_from
        found = prepared.checkpoint_content()
        if settings.resume_from != resume_from and run_record(settings) is None:
            self.messages.say(
                f"harness: autolog: {settings.run_name} starts from the script's own weights: {resume_from} is used "
                "for the first training"
            )
        logger = self.logger = open_run(self._context, settings, prepared, self._values.early_params)
        self._context.exit_hooks.training_begins()
        state = self.state = AutologState(self._training, prepared)
        logger.register("autolog", state, is_lenient=True)
        content = found if isinstance(found, CheckpointContent) else None
        self._checkpointed = () if content is None else (content.model, content.optimizer, content.scheduler)
        self.register_objects()
        if content is None and found:
            self.messages.say_once(f"{found}, so there are metrics and no checkpoints")
        elif content is not None:
            if content.note:
                self.messages.say_once(content.note)
            require_first_optimizer(logger.previous_state("autolog"))
            logger.watch(content.model, content.optimizer, content.scheduler)
        self._observer = EpochObserver(logger, prepared, content, state, self, self.messages)
        self._values.run_opened(logger)
        if num_done := logger.epoch + (1 if logger.events.loaders_done else 0):
            assert content is not None
            self._start_replay(Replay(logger, content.model, num_done, prepared.loaders))
        return self._observer

    def register_objects(self) -> None:
        """Add the objects of `register_for_checkpointing` to the checkpoints."""
        logger, accelerator = self.logger, self.prepared.accelerator
        if logger is None or self.is_over:
            return
        objects = getattr(accelerator, "_custom_objects", [])
        for number in range(self._num_registered, len(objects)):
            name, registered = f"custom_checkpoint_{number}", objects[number]
            if any(registered is each for each in with_unwrapped(self._checkpointed)):
                continue
            try:
                logger.register(name, registered, is_lenient=True)
            except CheckpointError as error:
                self.messages.say_once(
                    f"{type(registered).__name__}, given to register_for_checkpointing, is left out: {error}"
                )
        self._num_registered = len(objects)

    # ------------------------------------------------------------------------------ completed epochs

    def _start_replay(self, replay: Replay) -> None:
        self._replay = replay
        self._context.replay_patches.install()
        num_done = replay.num_left
        epochs = (
            "first epoch is complete: it is" if num_done == 1 else f"first {num_done} epochs are complete: they are"
        )
        self.messages.say(
            f"harness: the script's {epochs} replayed with one batch each and without effect; what the script logs or "
            "saves through accelerate meanwhile is left out"
        )

    def epoch_begins(self) -> None:
        """End the replay, since a new epoch begins."""
        if self._replay is not None:
            self._replay.end(self.prepared.loaders)
            self._replay = None

    def _replayed(self, loader: Any, original: Original, replay: Replay, key: IterationKey) -> Iterator[Any]:
        try:
            yield from replay.one_batch(loader, original)
        finally:
            is_likely = self._training.is_likely(key)
            if is_likely and self.logger is not None:
                self.logger.events.record_iteration(has_batches=not replay.is_empty)
            is_uneven = dataloaders.may_be_uneven(loader, self.prepared.num_processes)
            if replay.is_empty and is_uneven and is_likely:
                replay.backward()  # other ranks have a batch of it
            self._end_replayed_iteration()

    def _end_replayed_iteration(self) -> None:
        if self._replay is None or (loader := self._replay.take_trained()) is None:
            return
        lacks_epoch_end = self._replay.end_training_iteration(loader)
        if not self.is_replaying:
            # The script's saves after the last completed epoch take effect.
            self._context.replay_patches.remove()
        if lacks_epoch_end:
            # The run was interrupted after an epoch's last step but before its end, which is reported next.
            assert self._observer is not None
            self._replay = None
            self._observer.reopen_epoch()

    # ------------------------------------------------------------------------------ the end

    def finish(self) -> None:
        """End the last epoch, and the run as FINISHED.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        logger, observer = self.logger, self._observer
        if self.is_over or logger is None:
            self.close()
            return
        if observer is None:
            # The script has caught the error that prevented the start.
            self.fail(HarnessError("the training could not begin"))
            return
        try:
            self._end_replayed_iteration()
            observer.end()
            if self._replay is not None and not self.is_replaying:
                # No epoch was left to train, so the script continues with the checkpoint's random state.
                logger.events.restore_rng_state()
            self.close()
            logger.close()
        except BaseException as error:
            raise self.fail(error) from error.__cause__

    def fail(self, error: BaseException, *, is_retried: bool = False) -> BaseException:
        """End the run as failed.

        Args:
            error: the error that was raised.
            is_retried: whether the script tries again; its own MLflow run then stays active.

        Returns:
            The error that ended the training: another rank's, if `error` only follows from it.
        """
        logger = self.logger
        has_ended, self._has_failed = self._has_failed or (self.is_over and logger is None), True
        self.close()
        if logger is None or has_ended:
            return error
        cause = logger.fail(error)
        if not is_retried:
            was_asked = isinstance(cause, (Stopped, KeyboardInterrupt))
            end_active_run(logger.mlflow_run_id, "KILLED" if was_asked else "FAILED")
        return cause

    def close(self) -> None:
        """Stop logging without ending the run, which belongs to the parent in a forked child."""
        self.is_over = True
        self._replay = None
        self._context.replay_patches.remove()
        if self._observer is not None:
            self._observer.close()

    def report_unseen_training(self) -> None:
        """Print a message if the script has prepared objects but no training was observed."""
        if self.prepared.accelerator is not None and not self._training.keys:
            lost = "nothing was logged" if self.logger is None else "the run has no loss, no epoch and no checkpoint"
            self.messages.say_once(f"no iteration over a prepared loader with accelerator.backward was seen: {lost}")
