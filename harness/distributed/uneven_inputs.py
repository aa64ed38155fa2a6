"""Which optimizer steps all ranks have, in a pass of which one rank may have fewer batches than another.

    a step at which something collective is due    the ranks say that they are there, and wait for each other
    a rank has no further batch                    it says so, once, and waits for nobody
    the next time that another asks                ... it knows, and does nothing collective until they meet
    the pass is over on all of them                they meet, before whatever comes next

Nobody is waited for who may be waiting elsewhere: a rank that is done says so before it gets to where the others'
gradients are (`torch.distributed.algorithms.join`). How many batches there are, nobody needs to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from harness.distributed.consensus import Consensus


@dataclass(frozen=True)
class StepStatus:
    """What the ranks have said at a step.

    Args:
        asked: of each number that a rank has given, the largest.
        are_here: every rank is at this step, and none alone is at its last batch.
        is_last: all of them are at their last batch.
    """

    asked: Sequence[int]
    are_here: bool
    is_last: bool


@dataclass(frozen=True)
class MeetingResult:
    """What the ranks have said behind a pass.

    Args:
        asked: of each number that a rank has given, the largest.
        most: of the numbers of steps.
        fewest: likewise.
        is_cut_short: whether any rank has left the pass before its end.
    """

    asked: Sequence[int]
    most: int
    fewest: int
    is_cut_short: bool


class UnevenInputs:
    """Finds out, at the steps that need it, whether every rank is there.

    Effects: `ask` and `meet` are collective, and block until every rank has called one of them or `end`; `end` blocks
    for nobody; main thread; nothing on disk.

    Args:
        votes: by which they say it; no other vote is on its way while `may_differ`.
        num_asked: how many numbers `ask` and `meet` are given.

    Attributes:
        may_differ: a pass runs, or is over and the ranks have not met since, of which some may have fewer batches.
        is_apart: nothing collective is to be done until the ranks have met.
    """

    def __init__(self, votes: Consensus, num_asked: int) -> None:
        self._votes = votes
        self._num_asked = num_asked
        self.may_differ = self.is_apart = False

    def begin(self, *, may_differ: bool) -> None:
        """A pass begins, or the one that has begun is none."""
        self.may_differ, self.is_apart = may_differ, False

    def ask(self, asked: Sequence[int], *, is_last: bool) -> StepStatus:
        """This rank is at a step at which something is due on every rank that gets there.

        Args:
            asked: what this rank is asked for.
            is_last: it has no further batch.
        """
        has_ended, any_is_last, any_is_not, *largest = self._exchange([False, is_last, not is_last, *asked])
        # Of two ranks' last batches one may be a step, and the other none: what is due waits until they meet.
        are_here = not has_ended and not (any_is_last and any_is_not)
        self.is_apart = not are_here or bool(any_is_last)
        return StepStatus(largest, are_here, not any_is_not)

    def end(self) -> None:
        """This rank has no further batch; the others learn it when they ask."""
        if self.may_differ and not self.is_apart:
            self.is_apart = True
            # Where a rank is gone, that is told where somebody waits for it.
            with suppress(RuntimeError):
                self._votes.cast([True, False, False, *[0] * self._num_asked])

    def meet(self, step: int, asked: Sequence[int], *, is_cut_short: bool) -> MeetingResult:
        """Wait for the other ranks' ends of the pass.

        Args:
            step: optimizer steps that are complete on this rank.
            asked: what this rank is asked for.
            is_cut_short: this rank has left the pass before its end.
        """
        self.end()
        self._votes.read()
        most, minus_fewest, any_is_cut_short, *largest = self._exchange([step, -step, is_cut_short, *asked])
        self.may_differ = self.is_apart = False
        return MeetingResult(largest, most, -minus_fewest, bool(any_is_cut_short))

    def _exchange(self, numbers: Sequence[int]) -> list[int]:
        self._votes.cast(numbers)
        found = self._votes.read()
        assert found is not None, "a vote that was cast is there to be read"
        return found
