"""What any one rank asks for, known to all ranks at the same step, and nobody waits for it.

    step s       each rank casts its vote: one small reduction, begun and left to gloo's threads
    step s + 1   each rank reads the result, which has had a whole step to arrive

So a signal at one rank stops all of them after the same step. Where steps are short the votes are cast
at every so many of them, which all ranks count alike.
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

# A vote costs about 0.2 ms of the host's time: a five-hundredth of this.
_INTERVAL_S = 0.1
_MAX_STEPS = 1000


class Consensus:
    """One vote at a time: cast at one step, read at the next.

    Effects: collective on its own group (every rank casts and reads at the same steps); main thread; `cast`
    does not block, `read` blocks until the other ranks have cast, at most `timeout_s`; nothing on disk.

    Args:
        group: a gloo group for this alone, or None for a single process.
        timeout_s: limit of a wait, in seconds.

    Attributes:
        every_n_steps: how often a vote is due; the same on every rank. In one process none is due by number: whoever
            asks is heard at once.
        steps_since: how many steps were done since the last vote was cast; counted by whoever steps, since at most of
            them nothing else is to be done here.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float = 600.0) -> None:
        self._group = group
        self._timeout_s = timeout_s
        self._work: dist.Work | None = None
        self._numbers: torch.Tensor | list[int] | None = None
        self.steps_since = 0
        self.every_n_steps = 1 if group is not None else sys.maxsize

    def pace(self, step_time_s: float) -> None:
        """Adapt to how long a step takes: the same number on every rank, such as a reduced metric."""
        if self._group is not None and step_time_s > 0:
            self.every_n_steps = max(1, min(_MAX_STEPS, int(_INTERVAL_S / step_time_s)))

    @property
    def is_due(self) -> bool:
        """Whether a vote is to be cast at this step."""
        return self._group is None or self.steps_since >= self.every_n_steps

    @property
    def is_cast(self) -> bool:
        """Whether there is a vote to be read."""
        return self._numbers is not None

    def cast(self, numbers: Sequence[int]) -> None:
        """Say what this rank asks for; of each number the largest counts."""
        assert self._numbers is None, "a vote was cast before the one before it was read"
        self.steps_since = 0
        if self._group is None:
            self._numbers = list(numbers) if any(numbers) else None
            return
        import torch.distributed as dist

        self._numbers = torch.tensor(numbers, dtype=torch.int64)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.MAX)
        self._work = self._group.allreduce([self._numbers], options)

    def read(self) -> list[int] | None:
        """What all ranks together ask for, or None where no vote was cast since the last time.

        Raises:
            PeerFailure: if a rank did not vote in time, or is gone.
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
