"""Turn autologging on and off in this process: the replaced functions, and the hooks at the script's end."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from harness.autologging.context import AutologContext
from harness.autologging.patches.mlflow import MlflowPatches
from harness.autologging.patches.other_ranks import OtherRanks
from harness.autologging.patches.summary_writers import SummaryWriters
from harness.autologging.replacements import Function, Replacement, Replacements
from harness.autologging.session import Session
from harness.autologging.settings import AutologSettings
from harness.autologging.sources.accelerate import REPLAY_TABLE, AccelerateSource
from harness.autologging.training_registry import TrainingRegistry


class Patcher:
    """Replaces functions, whose calls are the events of a training.

    Effects: as `harness.autolog`.
    """

    def __init__(self, settings: AutologSettings) -> None:
        self._context = AutologContext(settings, Replacements(REPLAY_TABLE))
        self._registry = registry = TrainingRegistry(self._context)
        self._source = AccelerateSource(registry)
        # `OtherRanks` comes last, so that it wraps the other patches, which then run on rank 0 alone.
        patches = (MlflowPatches(registry), SummaryWriters(registry), OtherRanks(registry))
        rows = [*self._source.table(), *self._table(), *(row for each in patches for row in each.table())]
        self._replacements = Replacements(rows)

    @property
    def settings(self) -> AutologSettings:
        """The settings of trainings that have not begun."""
        return self._context.settings

    @property
    def session(self) -> Session:
        """The training that runs, or begins next."""
        return self._registry.session

    def turn_on(self) -> None:
        """Install the replacements, and the hooks at the script's end."""
        self._replacements.install()
        self._source.install()
        self._context.exit_hooks.install(self._registry)

    def turn_off(self, *, reports_unseen: bool = True) -> None:
        """Restore the functions and end a running training; `reports_unseen`: print a message if none was observed."""
        self._replacements.remove()
        self._source.remove()
        self._context.exit_hooks.remove()
        self._registry.finish(reports_unseen=reports_unseen)

    def forked(self) -> None:
        """Adapt to a fork, in the child."""
        self._registry.forked()

    def change(self, settings: AutologSettings) -> None:
        """Change the settings of trainings that have not begun."""
        self._registry.change(settings)

    def finish(self) -> None:
        """Report that the script ended normally; see `TrainingRegistry.finish`."""
        self._registry.finish()

    def fail(self, error: BaseException) -> BaseException:
        """Report that the script failed; returns the error that really ended it."""
        return self._registry.fail(error)

    def _table(self) -> list[Replacement]:
        return [
            Replacement("argparse", "ArgumentParser.parse_known_args", "the script's arguments", self._parse_arguments)
        ]

    def _parse_arguments(
        self,
        original: Function,
        parser: argparse.ArgumentParser,
        args: Sequence[str] | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed: tuple[argparse.Namespace, list[str]] = original(parser, args, *others, **kwargs)
        self._context.arguments.parsed(args, parsed[0])
        return parsed


_on: Patcher | None = None


def turn_on(settings: AutologSettings) -> None:
    """Start autologging, or change the settings of trainings that have not begun."""
    global _on
    if _on is None:
        _on = Patcher(settings)
        _on.turn_on()
    else:
        _on.change(settings)


def turn_off(*, reports_unseen: bool = True) -> None:
    """End autologging, if it is on; see `Patcher.turn_off`."""
    global _on
    patcher, _on = _on, None
    if patcher is not None:
        patcher.turn_off(reports_unseen=reports_unseen)


def change(settings: AutologSettings) -> None:
    """Change the settings of trainings that have not begun, if autologging is on."""
    if _on is not None:
        _on.change(settings)


def _forked() -> None:
    if _on is not None:
        _on.forked()


os.register_at_fork(after_in_child=_forked)


def script_ended(error: BaseException | None) -> BaseException | None:
    """Report the script's end to the training, for `harness run`; returns the error that really ended it.

    Raises:
        HarnessError: if the last checkpoint could not be written.
    """
    if _on is None:
        return error
    if error is not None:
        return _on.fail(error)
    _on.finish()
    return None
