"""Times of optimizer steps on the host, and what a rank tells of them."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping

# Percentiles are over so many of the latest steps.
_NUM_KEPT = 128


class StepTimer:
    """Durations between the ends of optimizer steps, evaluation and saving left out.

    Effects: not collective; main thread; never synchronises with the device (over many steps the
    host's pace is the device's); nothing on disk.
    """

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._last_s: float | None = None
        self._window_s = 0.0
        self._window_steps = 0
        self._window_samples = 0

    def resume(self) -> None:
        """A stretch of training begins: what came before is not part of the next step."""
        self._last_s = time.perf_counter()

    def step(self, num_samples: int) -> float:
        """One optimizer step is done, over so many samples of this rank; the time that it is, in seconds."""
        now_s = time.perf_counter()
        if self._last_s is not None:
            duration_s = now_s - self._last_s
            self._durations_s.append(duration_s)
            self._window_s += duration_s
            self._window_steps += 1
            self._window_samples += num_samples
        self._last_s = now_s
        return now_s

    def pop(self) -> dict[str, float]:
        """This rank's gauges since the last `pop`: steps/s, samples/s and percentiles in seconds."""
        window_s = self._window_s or math.inf
        ordered = sorted(self._durations_s)
        gauges = {
            "steps_per_s": self._window_steps / window_s,
            "samples_per_s": self._window_samples / window_s,
            "step_time_p50_s": percentile(ordered, 0.50),
            "step_time_p99_s": percentile(ordered, 0.99),
        }
        self._window_s, self._window_steps, self._window_samples = 0.0, 0, 0
        return gauges


GAUGES = ("steps_per_s", "samples_per_s", "step_time_p50_s", "step_time_p99_s", "memory_bytes")


def percentile(ordered: list[float], share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank); 0 where there is none."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def over_ranks(gauges: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Each rank's gauges as the metrics of the job."""
    p50 = sorted(gauges["step_time_p50_s"])
    samples_per_s = sum(gauges["samples_per_s"])
    return {
        "perf/steps_per_s": min(gauges["steps_per_s"]),
        # Somebody else's loop may not say how large a batch was.
        **({"perf/samples_per_s": samples_per_s} if samples_per_s else {}),
        "perf/step_time_p50_s": percentile(p50, 0.5),
        "perf/step_time_p99_s": max(gauges["step_time_p99_s"]),
        # How far the slowest rank's usual step is from the fastest's.
        "perf/step_time_spread_s": p50[-1] - p50[0],
        "perf/memory_max_bytes": max(gauges["memory_bytes"]),
    }
