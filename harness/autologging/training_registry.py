"""Track the trainings of one process, one after the other, and name their runs.

A training ends when the script ends it (`end_training`, `free_memory`), or when the script prepares another model and
its optimizer, which belong to the next training. Runs are named `x`, `x-2`, `x-3` and so on in the order in which
trainings begin, so that a restarted script finds the run of each training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import compress
from types import FrameType
from typing import Any

from accelerate import Accelerator
from torch import nn

from harness.autologging.context import AutologContext
from harness.autologging.script import kind_of
from harness.autologging.session import Session
from harness.autologging.settings import AutologSettings, first_run_of, run_id_of
from harness.checkpoint.format.names import unwrapped
from harness.diagnostics.report import what_there_is
from harness.errors import HarnessError, Stopped

# Frames, innermost first, of running calls that accelerate retries on exhausted memory. Python reuses their `id`s.
Attempts = tuple[FrameType, ...]


@dataclass(frozen=True)
class _PrepareCall:
    accelerator: Accelerator
    given: tuple[Any, ...]
    prepared: tuple[Any, ...]
    attempts: Attempts


class TrainingRegistry:
    """Holds the current training, and begins the next one.

    Effects: `add_prepared`, `end_training` and `finish` are collective where they end a training: every rank calls them
    alike, in the main thread. The rest is not.

    Attributes:
        session: the training that runs, or begins next.
    """

    def __init__(self, context: AutologContext) -> None:
        self.context = context
        # The number, from 1, of `session` among those with these settings, and the first one's run name.
        self._number = 1
        self._name: str | None = None
        # Whether no training is complete, so that earlier ones were attempts of the first.
        self._is_first = True
        self._config: Mapping[str, Any] | None = None
        self._calls: list[_PrepareCall] = []
        self._later_calls: list[_PrepareCall] = []
        self._begun_in: Attempts = ()
        self.session = self._new_session()

    def change(self, settings: AutologSettings) -> None:
        """Change the settings of trainings that have not begun."""
        before, self.context.settings = self.context.settings, settings
        if _run_of(before) != _run_of(settings):
            # Numbers are counted for each name.
            self._number, self._is_first = (0 if self.session.has_begun else 1), True
        if not self.session.has_begun:
            self.session.change(self._settings_of(self._number))

    # ------------------------------------------------------------------------------ which training it is

    def _settings_of(self, number: int) -> AutologSettings:
        settings = self.context.settings
        if number <= 1:
            return settings
        logger = self.session.logger
        first = logger.run_name if self._number == 1 and logger is not None else self._name
        if first is None:
            return settings
        resume_from = settings.resume_from
        if not self._is_first and resume_from != "never":
            # A named checkpoint belongs to one training, whose completed epochs it counts.
            resume_from = "auto"
        return replace(settings, run_name=f"{first}-{number}", resume_from=resume_from, first_run=first)

    def run_id_to_resume(self) -> str | None:
        """Return the id of the MLflow run that the current training resumes, if it has not begun."""
        return run_id_of(self.session.settings)

    def next_run_id_to_resume(self) -> str | None:
        """Return the id of the MLflow run that the next training resumes."""
        return run_id_of(self._settings_of(self._number + 1))

    def _new_session(self) -> Session:
        session = Session(self.context, self._settings_of(self._number))
        if self._config is not None:
            session.log_params({"config": self._config})
        return session

    def _begin_next(self, calls: Sequence[_PrepareCall], *, is_attempt: bool = False) -> None:
        if self.session.has_begun:
            self._is_first &= is_attempt
            assert self.session.logger is not None
            if self._number == 1:
                self._name = self.session.logger.run_name
            self._number += 1
        self.session = self._new_session()
        self._calls, self._later_calls, self._begun_in = list(calls), [], ()
        for call in calls:
            self.session.prepared.add(call.accelerator, call.given, call.prepared)

    # ------------------------------------------------------------------------------ events of the script

    def add_prepared(self, accelerator: Accelerator, given: Sequence[Any], prepared: Sequence[Any]) -> None:
        """Add the arguments and results of `prepare` to the current training, or begin the next one with them.

        Raises:
            HarnessError: if a training ends here, and its last checkpoint could not be written.
        """
        call = _PrepareCall(accelerator, tuple(given), tuple(prepared), _attempts_here())
        session = self.session
        if session.is_over:
            self._begin_next([call])
            return
        (self._later_calls if session.has_begun else self._calls).append(call)
        if not session.has_begun:
            session.prepared.add(accelerator, given, prepared)
        elif self._is_next_training():
            self.finish()
            self._begin_next(self._later_calls)
        else:
            own = [not self._is_other_model(each) for each in prepared]
            session.prepared.add(accelerator, [*compress(given, own)], [*compress(prepared, own)])

    def _is_other_model(self, model: Any) -> bool:
        if not isinstance(model, nn.Module):
            return False
        known = self.session.prepared.models
        if any(unwrapped(each) is unwrapped(model) for each in known):
            return False
        parameters = {id(each) for each in model.parameters() if each.requires_grad}
        return bool(parameters) and not any(id(each) in parameters for model in known for each in model.parameters())

    def _is_next_training(self) -> bool:
        """Whether the later calls have prepared both another model and an optimizer of it."""
        models = [each for call in self._later_calls for each in call.prepared if self._is_other_model(each)]
        parameters = {id(each) for model in models for top in (model, unwrapped(model)) for each in top.parameters()}
        for call in self._later_calls if models else ():
            for given in call.given:
                if kind_of(given) != "optimizers":
                    continue
                if not hasattr(given, "param_groups"):  # DeepSpeed's placeholder, prepared in one call with its model
                    if any(each is model for each in call.prepared for model in models):
                        return True
                elif any(id(each) in parameters for group in given.param_groups for each in group["params"]):
                    return True
        return False

    def iteration_begins(self) -> None:
        """Record the attempt in which an iteration over a loader begins."""
        if not self.session.has_begun:
            self._begun_in = _attempts_here()

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Log the parameters of the script's tracker to each of its trainings."""
        self._config = config
        self.session.log_params({"config": config})

    def forked(self) -> None:
        """Begin the next training in a forked child, since the current one belongs to the parent."""
        if self.session.has_begun:
            self.session.close()
            self._begin_next(())

    # ------------------------------------------------------------------------------ the end

    def end_training(self, accelerator: Accelerator, *, ends_tracker: bool) -> None:
        """End the training of an accelerator; `ends_tracker`: its trackers end too.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        if ends_tracker:
            self._config = None
        if accelerator is self.session.prepared.accelerator:
            self.finish()
            self._begin_next(())

    def attempt_failed(self, error: BaseException) -> None:
        """Fail an attempt that ran out of memory; accelerate calls the script's function again with smaller batches.

        What was prepared outside of the function stays prepared for the next attempt.
        """
        here, session = next(iter(_attempts_here()), None), self.session
        # A function that fails within the training, such as an evaluation, is not an attempt of the training.
        own = self._begun_in if session.is_running else [each for call in self._calls for each in call.attempts]
        if here not in own:
            return
        is_running = session.is_running
        if is_running:
            session.fail(error, is_retried=True)
        calls = [each for each in (*self._calls, *self._later_calls) if here not in each.attempts]
        self._begin_next(calls, is_attempt=True)
        if is_running:
            assert session.logger is not None
            session.messages.say(
                f"harness: autolog: the attempt of run {session.logger.run_name} has failed; the next attempt is run "
                f"{self.session.settings.run_name}"
            )

    def finish(self, *, reports_unseen: bool = True) -> None:
        """End the training; `reports_unseen`: print a message if none was observed.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        session = self.session
        if reports_unseen:
            session.report_unseen_training()
        was_running = session.is_running
        session.finish()
        self._begun_in = ()
        if was_running:
            self._summarize(session, is_complete=True)

    def fail(self, error: BaseException) -> BaseException:
        """End the training as failed; returns the error that really ended it."""
        session = self.session
        was_running = session.is_running
        cause = session.fail(error)
        if was_running and not isinstance(cause, Stopped):
            self._summarize(session, is_complete=False)
        return cause

    def _summarize(self, session: Session, *, is_complete: bool) -> None:
        logger = session.logger
        is_silent = self.context.settings.tracking.silent
        if session.prepared.is_rank_zero and not is_silent and logger is not None and logger.run_path:
            # Do not let an error here hide how the training ended.
            with suppress(OSError, ValueError, HarnessError):
                first = first_run_of(logger.run_path)
                logger.say(what_there_is(logger.run_path, goes_on_with=None if is_complete else first))


def _run_of(settings: AutologSettings) -> tuple[str | None, str, str]:
    return settings.run_name, settings.run_dir, settings.resume_from


def _attempts_here() -> Attempts:
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "decorator" and frame.f_globals.get("__name__") == "accelerate.utils.memory":
            found.append(frame)
        frame = frame.f_back
    return tuple(found)
