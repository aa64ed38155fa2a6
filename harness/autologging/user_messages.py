"""Lines of autologging's for the user."""

from __future__ import annotations

from collections.abc import Callable

from harness.io.progress import Progress

_ADVICE = (
    "; with PeriodicLogger(accelerator), its watch(model, optimizer), epochs(n) and batches(loader) you say it yourself"
)


class UserMessages:
    """Says what is to be said.

    Effects: not collective; any thread; nothing on disk.

    Args:
        says: whether this rank says anything, now.
    """

    def __init__(self, says: Callable[[], bool]) -> None:
        self._says = says
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        """A line."""
        if self._says():
            Progress(enabled=False).say(line)

    def say_once(self, what: str, *, advises: bool = True) -> None:
        """What cannot be told from outside, with what to do about it; once."""
        if what not in self._said:
            self._said.add(what)
            self.say(f"harness: autolog: {what}{_ADVICE if advises else ''}")
