"""Share state between the trainings of one process, and print autologging's messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from harness.autologging.exit_hooks import ExitHooks
from harness.autologging.replacements import Replacements
from harness.autologging.script import Arguments, Prepared
from harness.autologging.settings import AutologSettings
from harness.io.progress import Progress

_ADVICE = (
    "; to name the parts yourself, use PeriodicLogger(accelerator): watch(model, optimizer), epochs(n), batches(loader)"
)


@dataclass
class AutologContext:
    """Holds the state that the trainings, sources and patches of one process share.

    Args:
        settings: settings of the trainings that have not begun.
        replay_patches: installed during a replay, so that the script's steps and saves have no effect.
        active_run_ids: MLflow runs that have been the script's active run. One that is no longer active was ended by
            the script.
        params_of_runs: MLflow run id -> logged parameters, since several trainings may log to one run of the script.
        is_in_tracker: whether a tracker of accelerate is being called.
        is_logged_already: whether that tracker receives values that are already in the run.
    """

    settings: AutologSettings
    replay_patches: Replacements
    exit_hooks: ExitHooks = field(default_factory=ExitHooks)
    arguments: Arguments = field(default_factory=Arguments)
    active_run_ids: set[str] = field(default_factory=set)
    params_of_runs: dict[str, dict[str, str]] = field(default_factory=dict)
    is_in_tracker: bool = False
    is_logged_already: bool = False

    @contextmanager
    def in_tracker(self, *, is_logged_already: bool = False) -> Iterator[None]:
        """Mark the calls within it as those of a tracker of accelerate."""
        self.is_in_tracker, self.is_logged_already = True, is_logged_already
        try:
            yield
        finally:
            self.is_in_tracker = self.is_logged_already = False

    def saw_active_run(self, run_id: str | None) -> None:
        """Record an active MLflow run of the script."""
        if run_id is not None:
            self.active_run_ids.add(run_id)


class UserMessages:
    """Prints messages about one training on standard error, from rank 0.

    Effects: not collective; any thread; nothing on disk.
    """

    def __init__(self, prepared: Prepared, *, is_silent: bool) -> None:
        self._prepared = prepared
        self._said: set[str] = set()
        self.is_silent = is_silent

    def say(self, line: str) -> None:
        """Print a line."""
        if self._prepared.is_rank_zero and not self.is_silent:
            Progress(enabled=False).say(line)

    def say_once(self, problem: str, *, advises: bool = True) -> None:
        """Print a limit of observing the script from outside, once; with the remedy if `advises`."""
        if problem not in self._said:
            self._said.add(problem)
            self.say(f"harness: autolog: {problem}{_ADVICE if advises else ''}")
