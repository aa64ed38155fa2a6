"""Detect ranks that run out of batches, so that collective work runs only at steps that every rank reaches.

    a step at which collective work is due   every rank calls `check_step`, which blocks for the other ranks
    a rank has no further batch              it calls `mark_exhausted` once, which does not block
    the next `check_step` of another rank    reports the divergence; that rank runs no collective work either
    the iteration is over on all ranks       they call `synchronize` before the next collective work

An exhausted rank calls `mark_exhausted` before it joins the other ranks' gradient reductions
(`torch.distributed.algorithms.join`), so the ranks cannot deadlock. The numbers of batches need not be known.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from harness.distributed.consensus import Consensus


@dataclass(frozen=True)
class StepStatus:
    """The combined reports of all ranks at a step.

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
    """The combined reports of all ranks after an iteration: maxima, and the smallest number of optimizer steps."""

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

    Attributes:
        may_be_uneven: whether ranks may have different numbers of batches since they last synchronized.
        has_diverged: whether no collective work may run until the ranks synchronize.
    """

    def __init__(self, votes: Consensus, num_requests: int) -> None:
        self._votes = votes
        self._num_requests = num_requests
        self.may_be_uneven = self.has_diverged = False

    def begin_iteration(self, *, may_be_uneven: bool) -> None:
        """Begin an iteration, or discard the current one if it does not train."""
        self.may_be_uneven, self.has_diverged = may_be_uneven, False

    def check_step(self, requests: Sequence[int], *, is_last: bool) -> StepStatus:
        """Exchange requests at a step at which collective work is due; `is_last` if no batch of this rank follows."""
        is_exhausted, any_is_last, any_is_not, *largest = self._exchange([False, is_last, not is_last, *requests])
        # One rank's last batch may complete a step and another's not, so collective work waits for `synchronize`.
        all_present = not is_exhausted and not (any_is_last and any_is_not)
        self.has_diverged = not all_present or bool(any_is_last)
        return StepStatus(largest, all_present, not any_is_not)

    def mark_exhausted(self) -> None:
        """Report that this rank has no further batch; the others receive it at their next `check_step`."""
        if self.may_be_uneven and not self.has_diverged:
            self.has_diverged = True
            # The next call that waits for a rank that is gone reports it.
            with suppress(RuntimeError):
                self._votes.cast([True, False, False, *[0] * self._num_requests])

    def synchronize(self, step: int, requests: Sequence[int], *, is_cut_short: bool) -> SyncResult:
        """Wait until the iteration is over on every rank.

        `step` counts this rank's completed optimizer steps. `is_cut_short` if this rank ended the iteration early.
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
