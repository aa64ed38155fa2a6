"""Reduce the ranks' requests without blocking, so that all ranks act on a request after the same step.

    step s       each rank casts its vote: starts a small all-reduce that gloo's threads run in the background
    step s + 1   each rank reads the result, which has usually arrived by then

A signal at one rank therefore stops all ranks after the same step. If steps are short, all ranks vote every few steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from harness.errors import PeerFailure

if TYPE_CHECKING:
    import torch.distributed as dist

# A vote costs about 0.2 ms of host time, 0.2 % of this interval.
_INTERVAL_S = 0.1
_MAX_STEPS = 1000


class Consensus:
    """Runs one vote at a time, cast at one step and read at the next.

    Effects: collective on its own group (every rank casts and reads at the same steps); main thread; `cast` does not
    block, `read` blocks until the other ranks have cast, at most `timeout_s`; nothing on disk.

    Args:
        group: a gloo group used for nothing else; None for a single process, which may vote at any step.

    Attributes:
        every_n_steps: the interval between votes, the same on every rank.
        num_steps_since_vote: incremented by the training loop, because most steps need no call into this class.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float = 600.0) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._work: dist.Work | None = None
        self._numbers: torch.Tensor | list[int] | None = None
        self.num_steps_since_vote = 0
        self.every_n_steps = 1 if group is not None else sys.maxsize

    def adapt_interval(self, step_time_s: float) -> None:
        """Adapt the interval to the duration of a step; every rank must pass the same number."""
        if self._group is not None and step_time_s > 0:
            self.every_n_steps = max(1, min(_MAX_STEPS, int(_INTERVAL_S / step_time_s)))

    @property
    def is_due(self) -> bool:
        """Whether this step casts a vote."""
        return self._group is None or self.num_steps_since_vote >= self.every_n_steps

    @property
    def is_pending(self) -> bool:
        """Whether a vote was cast and not yet read."""
        return self._numbers is not None

    def cast(self, numbers: Sequence[int]) -> None:
        """Cast this rank's requests; the result is the elementwise maximum over ranks."""
        assert self._numbers is None, "a vote was cast before the previous one was read"
        self.num_steps_since_vote = 0
        if self._group is None:
            self._numbers = list(numbers) if any(numbers) else None
            return
        import torch.distributed as dist

        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._work = self._group.allreduce([self._numbers], options)

    def read(self) -> list[int] | None:
        """Return the result of the pending vote, or None if there is none.

        Raises:
            PeerFailure: if a rank is gone or does not vote in time.
        """
        if self._numbers is None:
            return None
        numbers, self._numbers = self._numbers, None
        work, self._work = self._work, None
        if work is not None:
            try:
                work.wait(timedelta(seconds=self._timeout_s))
            except RuntimeError as error:
                raise PeerFailure(None, f"waiting for the ranks' votes: {error}") from error
        found: list[int] = numbers if isinstance(numbers, list) else numbers.tolist()
        return found
