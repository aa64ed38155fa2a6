"""Time optimizer steps on the host, and reduce the ranks' times to metrics of the job."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping

# Percentiles are over this number of latest steps.
_NUM_KEPT = 128


class StepTimer:
    """Measure durations between the ends of optimizer steps, without evaluation and saving.

    Effects: not collective; main thread; never synchronises with the device (over many steps the host's pace is the
    device's); nothing on disk.
    """

    def __init__(self) -> None:
        self._durations_s: deque[float] = deque(maxlen=_NUM_KEPT)
        self._last_s: float | None = None
        self._window_s = 0.0
        self._window_steps = 0
        self._window_samples = 0

    def resume(self) -> None:
        """Start a stretch of training: the time before it is not part of the next step."""
        self._last_s = time.perf_counter()

    def step(self, num_samples: int) -> float:
        """Count an optimizer step over `num_samples` samples of this rank; return its time of `perf_counter`."""
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
        """Return this rank's gauges since the last `pop`: steps/s, samples/s and percentiles in seconds."""
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
    """Return the value below which `share` of the sorted values lie (nearest rank); 0 without values."""
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))]


def over_ranks(gauges: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """Reduce the ranks' gauges to the metrics of the job."""
    p50 = sorted(gauges["step_time_p50_s"])
    samples_per_s = sum(gauges["samples_per_s"])
    return {
        "perf/steps_per_s": min(gauges["steps_per_s"]),
        # The batch size of an instrumented loop may be unknown.
        **({"perf/samples_per_s": samples_per_s} if samples_per_s else {}),
        "perf/step_time_p50_s": percentile(p50, 0.5),
        "perf/step_time_p99_s": max(gauges["step_time_p99_s"]),
        # Difference between the median step times of the slowest and the fastest rank.
        "perf/step_time_spread_s": p50[-1] - p50[0],
        "perf/memory_max_bytes": max(gauges["memory_bytes"]),
    }
