"""Ranks with different numbers of batches: at which steps every rank is present.

    a step at which something collective is due   every rank calls `check_step` and waits for the others
    a rank has no further batch                   it calls `mark_exhausted` once and does not wait
    the next `check_step` of another rank         reports the divergence; that rank does nothing collective either
    the iteration is over on all ranks            they call `synchronize` before the next collective work

An exhausted rank reports itself before it joins the other ranks' gradient reductions
(`torch.distributed.algorithms.join`), so no rank waits for one that waits elsewhere. The numbers of batches need not be
known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from harness.distributed.consensus import Consensus


@dataclass(frozen=True)
class StepStatus:
    """What all ranks report at a step.

    Args:
        requests: elementwise maximum of the ranks' requests.
        all_present: whether every rank is at this step, and either all or none are at their last batch.
        is_last: whether all ranks are at their last batch.
    """

    requests: Sequence[int]
    all_present: bool
    is_last: bool


@dataclass(frozen=True)
class SyncResult:
    """What all ranks report after an iteration.

    Args:
        requests: elementwise maximum of the ranks' requests.
        max_steps: largest number of completed optimizer steps.
        min_steps: smallest number of completed optimizer steps.
        is_cut_short: whether any rank left the iteration before its end.
    """

    requests: Sequence[int]
    max_steps: int
    min_steps: int
    is_cut_short: bool


class UnevenInputs:
    """Detects ranks that run out of batches, at the steps that need every rank.

    Effects: `check_step` and `synchronize` are collective and block until every rank has called one of them or
    `mark_exhausted`, which does not block; main thread; nothing on disk.

    Args:
        votes: carries the reports; no other vote may be pending while `may_be_uneven`.
        num_requests: length of the requests given to `check_step` and `synchronize`.

    Attributes:
        may_be_uneven: whether ranks may have different numbers of batches in the current iteration, or in one whose
            ranks have not synchronized since.
        has_diverged: whether nothing collective may run until the ranks have synchronized.
    """

    def __init__(self, votes: Consensus, num_requests: int) -> None:
        self._votes = votes
        self._num_requests = num_requests
        self.may_be_uneven = self.has_diverged = False

    def begin_iteration(self, *, may_be_uneven: bool) -> None:
        """Begin an iteration, or discard the current one if it turned out not to train."""
        self.may_be_uneven, self.has_diverged = may_be_uneven, False

    def check_step(self, requests: Sequence[int], *, is_last: bool) -> StepStatus:
        """Exchange requests at a step at which collective work is due on every rank that reaches it.

        Args:
            requests: of this rank.
            is_last: whether this rank has no further batch.
        """
        is_exhausted, any_is_last, any_is_not, *largest = self._exchange([False, is_last, not is_last, *requests])
        # Of two last batches one may be a step and the other not: collective work waits for `synchronize`.
        all_present = not is_exhausted and not (any_is_last and any_is_not)
        self.has_diverged = not all_present or bool(any_is_last)
        return StepStatus(largest, all_present, not any_is_not)

    def mark_exhausted(self) -> None:
        """Report that this rank has no further batch; the others learn it at their next `check_step`."""
        if self.may_be_uneven and not self.has_diverged:
            self.has_diverged = True
            # A rank that is gone is reported by the next call that waits for it.
            with suppress(RuntimeError):
                self._votes.cast([True, False, False, *[0] * self._num_requests])

    def synchronize(self, step: int, requests: Sequence[int], *, is_cut_short: bool) -> SyncResult:
        """Wait until the iteration is over on every rank.

        Args:
            step: completed optimizer steps of this rank.
            requests: of this rank.
            is_cut_short: whether this rank left the iteration before its end.
        """
        self.mark_exhausted()
        self._votes.read()
        max_steps, minus_min, any_is_cut_short, *largest = self._exchange([step, -step, is_cut_short, *requests])
        self.may_be_uneven = self.has_diverged = False
        return SyncResult(largest, max_steps, -minus_min, bool(any_is_cut_short))

    def _exchange(self, numbers: Sequence[int]) -> list[int]:
        self._votes.cast(numbers)
        found = self._votes.read()
        assert found is not None, "a cast vote has a result"
        return found
