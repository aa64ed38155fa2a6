"""The time limits of the publisher compared with those of collectives."""

from __future__ import annotations

import inspect

from harness.distributed.consensus import Consensus
from harness.metrics.reducer import Reducer
from harness.tracking.mlflow.client import LONGEST_TIMEOUT_S
from harness.tracking.publisher.progress import DEAD_AFTER_S
from harness.tracking.publisher.retries import LINGER_S, LONGEST_PAUSE_S


def test_time_limits_are_ordered_when_compared_with_collectives() -> None:
    shortest_s = min(inspect.signature(each).parameters["timeout_s"].default for each in (Reducer, Consensus))
    # The longest silence of one that is only slow: a request, and the pause behind it.
    assert LONGEST_TIMEOUT_S + LONGEST_PAUSE_S < DEAD_AFTER_S < shortest_s
    assert shortest_s > LINGER_S
