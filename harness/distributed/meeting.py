"""How this process's ranks have met. Importing this never imports torch: publisher and launchers do not need it."""

from __future__ import annotations

import os
from dataclasses import dataclass

# Set by `harness rank`: a name of the job's, which the ranks meet under (`harness.distributed.job_rendezvous`).
JOB_VARIABLE = "HARNESS_JOB"


@dataclass(frozen=True)
class Meeting:
    """What the ranks have met under (`harness.distributed.rendezvous`).

    Args:
        name: of this start, and of no other.
        is_restart: whether ranks have met at this store before: the launch goes on.
    """

    name: str
    is_restart: bool


_latest: Meeting | None = None


def have_met(meeting: Meeting) -> None:
    """This process's ranks have met."""
    global _latest
    _latest = meeting


def latest_meeting() -> Meeting | None:
    """How this process's ranks have met last; None: not in a way of ours."""
    return _latest


def is_first_of_launch() -> bool:
    """Whether the launcher has made this process rank zero; true where there is no launcher."""
    return os.environ.get("RANK", "0") == "0"
