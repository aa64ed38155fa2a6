"""Where a script has ranks with fewer batches join the others, as `Accelerator.join_uneven_inputs` does, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.autologging.replacements import Replacement
from harness.autologging.session import Session


class Joins:
    """Tells a session of torch's `Join` that the script is within.

    Effects: not collective; main thread; nothing on disk.

    Args:
        session: gives the training that runs.
    """

    def __init__(self, session: Callable[[], Session]) -> None:
        self._session = session

    def table(self) -> list[Replacement]:
        """What is replaced."""
        of_torch, why = "torch.distributed.algorithms.join", "ranks end apart"
        return [
            Replacement(of_torch, "Join.__enter__", why, self._enter),
            Replacement(of_torch, "Join.__exit__", why, self._leave),
        ]

    def _enter(self, original: Callable[..., Any], join: Any) -> Any:
        if join._enable:
            self._session().prepared.join = join
        return original(join)

    def _leave(self, original: Callable[..., Any], join: Any, *error: Any) -> Any:
        try:
            return original(join, *error)
        finally:
            self._session().prepared.join = None
