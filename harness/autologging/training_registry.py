"""The trainings of one process, one after the other: which one runs, with what, and how its run is called.

A training ends when the script says so (`end_training`, `free_memory`), or when an optimizer is prepared that steps a
model which is none of its own: that is the next training's. Runs are `x`, `x-2`, `x-3` and so on, in the order in which
trainings begin, so a script that is run again finds each of its trainings where it had left it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import compress
from types import FrameType
from typing import Any

from accelerate import Accelerator
from torch import nn

from harness.autologging.replacements import Replacements
from harness.autologging.script import Arguments, kind_of
from harness.autologging.session import Session
from harness.autologging.settings import AutologSettings, first_run_of, run_id_of, run_record, script_name
from harness.checkpoint.format.names import unwrapped
from harness.diagnostics.report import what_there_is
from harness.errors import HarnessError, Stopped
from harness.tracking.mlflow.given_run import GivenRun

# Calls that run of functions that accelerate calls once more when memory is out, by their frames, innermost first. Held
# as they are: the number of one that is over is given to another.
Attempts = tuple[FrameType, ...]


@dataclass(frozen=True)
class _Call:
    """What one call was given to prepare, and what it has returned."""

    accelerator: Accelerator
    given: tuple[Any, ...]
    prepared: tuple[Any, ...]
    attempts: Attempts


class TrainingRegistry:
    """Holds the training that runs, and begins the next one.

    Effects: `came`, `ends` and `finish` are collective where a training ends in them: every rank calls them alike, in
    the main thread. The rest is not.

    Args:
        settings: what was asked for.
        arguments: the script's.
        find_given_run: finds the MLflow run that the user has named and that is to be ours; rank zero's.
        end_active_run: called with our MLflow run's id and its status when a training has ended otherwise than well.
        stillness: makes what keeps the script's steps and saves still while epochs go by that are done.
        begins: called when a training has a run.

    Attributes:
        session: the training that runs, or is to begin.
    """

    def __init__(
        self,
        settings: AutologSettings,
        arguments: Arguments,
        find_given_run: Callable[[], GivenRun | None],
        end_active_run: Callable[[str | None, str], None],
        stillness: Callable[[], Replacements],
        begins: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._arguments = arguments
        self._find_given_run = find_given_run
        self._end_active_run = end_active_run
        self._stillness = stillness
        self._run_begins = begins
        # Of `session` among those with these settings, from 1; what the run of the first one is called.
        self._number = 1
        self._name: str | None = None
        # Whether none has trained yet: what came before were attempts of it.
        self._is_first = True
        self._is_attempt_over = False
        self._config: Mapping[str, Any] | None = None
        # Before the training began, and since.
        self._calls: list[_Call] = []
        self._later: list[_Call] = []
        self._begun_in: Attempts = ()
        self._params_of_runs: dict[str, dict[str, str]] = {}
        self.session = self._new_session()

    def change(self, settings: AutologSettings) -> None:
        """Other settings, for a training that has not begun."""
        before, self._settings = self._settings, settings
        if _where(before) != _where(settings):
            # Another run was named: of that name it is the first.
            self._number, self._is_first = (0 if self.session.has_begun else 1), True
        if not self.session.has_begun:
            self.session.settings = self._settings_of(self._number)

    # ------------------------------------------------------------------- which training it is

    def _settings_of(self, number: int) -> AutologSettings:
        """Those of a training by its number."""
        if number <= 1:
            return self._settings
        logger = self.session.logger
        first = logger.run_name if self._number == 1 and logger is not None else self._name
        if first is None:
            return self._settings
        resume_from = self._settings.resume_from
        if not self._is_first and resume_from != "never":
            # A checkpoint that was named is of one training, and knows how many of its epochs are done.
            resume_from = "auto"
        return replace(self._settings, run_name=f"{first}-{number}", resume_from=resume_from, first_run=first)

    def run_id_before(self) -> str | None:
        """The MLflow run that the training goes on in which is to begin."""
        return run_id_of(self.session.settings)

    def run_id_after(self) -> str | None:
        """The MLflow run that the training goes on in which comes after the one that runs."""
        return run_id_of(self._settings_of(self._number + 1))

    def _new_session(self) -> Session:
        session = Session(
            self._settings_of(self._number),
            self._arguments,
            script_name(),
            self._begins,
            self._ended_otherwise,
            self._stillness(),
            self._run_begins,
        )
        session.params_of_runs = self._params_of_runs
        if self._config is not None:
            session.log_params({"config": self._config})
        return session

    def _ended_otherwise(self, run_id: str | None, status: str) -> None:
        # The next attempt of a function goes on in an MLflow run that is active around it.
        if not self._is_attempt_over:
            self._end_active_run(run_id, status)

    def _begins(self) -> GivenRun | None:
        """Rank zero's, as a training begins: the MLflow run that the user has named and that is to be ours."""
        settings, asked = self.session.settings, self._settings.resume_from
        if settings.resume_from != asked and run_record(settings) is None:
            self.session.notes.say(
                f"harness: autolog: {settings.run_name} begins as the script has made it: {asked} is for "
                "the first training"
            )
        return self._find_given_run()

    def _begin_next(self, calls: Sequence[_Call], *, is_attempt: bool = False) -> None:
        if self.session.has_begun:
            self._is_first &= is_attempt
            assert self.session.logger is not None
            if self._number == 1:
                self._name = self.session.logger.run_name
            self._number += 1
        self.session = self._new_session()
        self._calls, self._later, self._begun_in = list(calls), [], ()
        for call in calls:
            self.session.prepared.add(call.accelerator, call.given, call.prepared)

    # ------------------------------------------------------------------- what the script does

    def came(self, accelerator: Accelerator, given: Sequence[Any], prepared: Sequence[Any]) -> None:
        """Something was prepared: for the training that runs, or for the next one.

        Raises:
            HarnessError: if a training ends here, and its last checkpoint could not be written.
        """
        call = _Call(accelerator, tuple(given), tuple(prepared), _attempts_here())
        session = self.session
        if session.is_over:
            self._begin_next([call])
            return
        (self._later if session.has_begun else self._calls).append(call)
        if not session.has_begun:
            session.prepared.add(accelerator, given, prepared)
        elif self._another_is_stepped():
            self._end(self._later)
        else:
            own = [not self._is_another(each) for each in prepared]
            session.prepared.add(accelerator, [*compress(given, own)], [*compress(prepared, own)])

    def _is_another(self, model: Any) -> bool:
        """Whether this is a model that can be trained, and none of the training that runs."""
        if not isinstance(model, nn.Module):
            return False
        known = self.session.prepared.models
        if any(unwrapped(each) is unwrapped(model) for each in known):
            return False
        parameters = {id(each) for each in model.parameters() if each.requires_grad}
        return bool(parameters) and not any(id(each) in parameters for model in known for each in model.parameters())

    def _another_is_stepped(self) -> bool:
        """Whether an optimizer has been prepared, at once or by and by, with a model that is another training's."""
        models = [each for call in self._later for each in call.prepared if self._is_another(each)]
        parameters = {id(each) for model in models for top in (model, unwrapped(model)) for each in top.parameters()}
        for call in self._later if models else ():
            for given in call.given:
                if kind_of(given) != "optimizers":
                    continue
                if not hasattr(given, "param_groups"):  # DeepSpeed's stand-in, which comes together with its model
                    if any(each is model for each in call.prepared for model in models):
                        return True
                elif any(id(each) in parameters for group in given.param_groups for each in group["params"]):
                    return True
        return False

    def passes(self) -> None:
        """A pass over a loader begins."""
        if not self.session.has_begun:
            self._begun_in = _attempts_here()

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Parameters of the script's tracker, whose trainings all have them."""
        self._config = config
        self.session.log_params({"config": config})

    def forked(self) -> None:
        """In a child process: the training that runs is its parent's, and what the child trains is the next one."""
        if self.session.has_begun:
            self.session.leave()
            self._begin_next(())

    # ------------------------------------------------------------------- how it ends

    def ends(self, accelerator: Accelerator, *, is_tracker_done: bool) -> None:
        """The script is done with what an accelerator trains.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        if is_tracker_done:
            self._config = None
        if accelerator is self.session.prepared.accelerator:
            self._end(())

    def _end(self, calls: Sequence[_Call]) -> None:
        self.finish()
        self._begin_next(calls)

    def attempt_failed(self, error: BaseException) -> None:
        """The function that trains is called once more, with smaller batches: what it had begun is no training.

        What was prepared outside of it is there for its next attempt.
        """
        here, session = next(iter(_attempts_here()), None), self.session
        is_begun = session.has_begun and not session.is_over
        # One within it that fails, an evaluation, say, is no attempt of the training's.
        if here not in (self._begun_in if is_begun else [each for call in self._calls for each in call.attempts]):
            return
        if is_begun:
            self._is_attempt_over = True
            session.fail(error)
            self._is_attempt_over = False
        self._begin_next([each for each in (*self._calls, *self._later) if here not in each.attempts], is_attempt=True)
        if is_begun:
            assert session.logger is not None
            session.notes.say(
                f"harness: autolog: the attempt of run {session.logger.run_name} has failed, and the next one begins: "
                f"its run is {self.session.settings.run_name}"
            )

    def finish(self) -> None:
        """The training has ended.

        Raises:
            HarnessError: if the last checkpoint could not be written.
        """
        session = self.session
        session.say_what_was_not_seen()
        is_end = session.has_begun and not session.is_over
        session.finish()
        self._begun_in = ()
        if is_end:
            self._say_what_there_is(session, is_done=True)

    def fail(self, error: BaseException) -> BaseException:
        """The script has failed; returns what really ended it."""
        session = self.session
        is_end = session.has_begun and not session.is_over
        cause = session.fail(error)
        if is_end and not isinstance(cause, Stopped):
            self._say_what_there_is(session, is_done=False)
        return cause

    def _say_what_there_is(self, session: Session, *, is_done: bool) -> None:
        logger = session.logger
        if session.is_rank_zero and not self._settings.tracking.silent and logger is not None and logger.run_path:
            # Nothing that fails here is to hide how the training ended.
            with suppress(OSError, ValueError, HarnessError):
                first = first_run_of(logger.run_path)
                logger.say(what_there_is(logger.run_path, goes_on_with=None if is_done else first))


def _where(settings: AutologSettings) -> tuple[str | None, str, str]:
    return settings.run_name, settings.run_dir, settings.resume_from


def _attempts_here() -> Attempts:
    found = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "decorator" and frame.f_globals.get("__name__") == "accelerate.utils.memory":
            found.append(frame)
        frame = frame.f_back
    return tuple(found)
