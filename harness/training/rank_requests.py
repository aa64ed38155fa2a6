"""Agree with all ranks on requests to stop or to save, and on the steps that all ranks have.

A request at one rank is known to all of them one step later, without a wait (`Consensus`). While ranks may have
different numbers of batches, they exchange requests at the steps at which a collective is due (`UnevenInputs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from harness.distributed.consensus import Consensus
from harness.distributed.uneven_inputs import StepStatus, SyncResult, UnevenInputs
from harness.training.run_session import RunSession


class RankRequests:
    """Exchange requests with the other ranks through `consensus`, which this object uses alone.

    Effects: `vote`, `read`, `ask`, `begin_inputs`, `synchronize` and `max_over_ranks` are collective; main thread;
    nothing on disk.

    Attributes:
        stop_signal: number of the signal at which all ranks stop; 0 without one.
        is_save_requested: whether all ranks save at the next step.
    """

    def __init__(self, session: RunSession, consensus: Consensus) -> None:
        self._session = session
        self._uneven = UnevenInputs(consensus, num_requests=2)
        self.consensus = consensus
        self.stop_signal = 0
        self.is_save_requested = False

    # ----------------------------------------------------------------------------------- votes

    def vote(self) -> bool:
        """Cast this rank's requests if a vote is due; return whether it was."""
        if not self.consensus.is_due:
            return False
        self.consensus.cast(self._own())
        return True

    def read(self) -> int:
        """Read the vote that was cast last; return the signal to stop by, or 0."""
        if (requests := self.consensus.read()) is not None:
            self._add(requests)
        return self.stop_signal

    def max_over_ranks(self, number: int) -> int:
        """Return the largest number of any rank. Blocks until every rank calls it."""
        self.read()
        self.consensus.cast([number])
        found = self.consensus.read()
        assert found is not None, "a vote that was cast can be read"
        return found[0]

    # ------------------------------------------------------------------------- uneven inputs

    @property
    def has_uneven_inputs(self) -> bool:
        """Whether a rank may have fewer batches of the current loader than another."""
        return self._uneven.may_be_uneven

    @property
    def has_diverged(self) -> bool:
        """Whether collectives are forbidden until `synchronize`."""
        return self._uneven.has_diverged

    def begin_inputs(self, *, may_be_uneven: bool) -> None:
        """Begin to iterate over a loader."""
        if may_be_uneven:
            self.read()
        self._uneven.begin_iteration(may_be_uneven=may_be_uneven)

    def discard_inputs(self) -> None:
        """Undo `begin_inputs`: no rank trained on the loader."""
        self._uneven.begin_iteration(may_be_uneven=False)

    def end_inputs(self) -> None:
        """Report that this rank has no further batch. Does not block."""
        self._uneven.mark_exhausted()

    def ask(self, *, is_last: bool) -> StepStatus:
        """Check whether every rank is at this step, and exchange requests; `is_last`: no further batch here."""
        # Read the votes of an evaluation within the loader that ended before its last batch.
        self.read()
        status = self._uneven.check_step(self._own_or_known(), is_last=is_last)
        self._add(status.requests)
        return status

    def synchronize(self, step: int, *, is_cut_short: bool) -> SyncResult:
        """Wait until every rank has ended the loader, and exchange requests.

        `step` counts this rank's optimizer steps; `is_cut_short` reports that it left the loader before its end.
        """
        result = self._uneven.synchronize(step, self._own_or_known(), is_cut_short=is_cut_short)
        self._add(result.requests)
        return result

    def _own(self) -> list[int]:
        return [self._session.stop_signal, self._session.pop_save_request()]

    def _own_or_known(self) -> list[int]:
        """Return this rank's requests and those that it knows of, as other ranks may not know them."""
        signal_number, is_save_requested = self._own()
        return [self.stop_signal or signal_number, self.is_save_requested or is_save_requested]

    def _add(self, requests: Sequence[int]) -> None:
        signal_number, is_save_requested = requests
        self.is_save_requested |= bool(is_save_requested)
        self.stop_signal = self.stop_signal or signal_number
