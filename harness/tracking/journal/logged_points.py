"""Read from the journal the points and parameters that earlier attempts at a run have logged.

A resumed run repeats the steps after its checkpoint. Points that are already in the journal are not logged again.
MLflow refuses a new value of a parameter, so a changed one is reported as drift.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from harness.tracking.journal.entries import Kind, read_entries
from harness.tracking.journal.pruning import read_pruned

# Prefixes of metrics that are measurements, whose values differ between attempts.
_MEASURED = ("perf/", "checkpoint/", "system/")
# MLflow's limit for the value of a tag is 8000.
MAX_DRIFT_CHARS = 7900

_METRICS: Final[tuple[Kind, ...]] = ("metrics",)
# The time of a point whose entry was pruned.
UNKNOWN_TIME_MS = -1


class Point(NamedTuple):
    """One point of a metric: value, time in milliseconds since the epoch, optimizer step."""

    value: float
    time_ms: int
    step: int


@dataclass
class _Series:
    """The points of one metric, sorted by step; 24 bytes each."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    times_ms: array[int] = field(default_factory=lambda: array("q"))

    def find(self, step: int) -> int | None:
        at = bisect_left(self.steps, step)
        return at if at < len(self.steps) and self.steps[at] == step else None

    def add(self, point: Point) -> None:
        at = bisect_left(self.steps, point.step)
        if at == len(self.steps) or self.steps[at] != point.step:  # the first point is kept
            self.steps.insert(at, point.step)
            self.values.insert(at, point.value)
            self.times_ms.insert(at, point.time_ms)


class KnownPoints:
    """Finds and compares the points that a resumed run repeats.

    Effects: rank 0's main thread; the constructor reads the journal once (5 to 8 s and 26 MB for a million points).

    Attributes:
        latest: name -> the last point at or before `step`.
        num_differing: number of repeated points with a different value, without measurements.
        largest_difference: the largest relative difference, 0 to 2; infinite if one value is not finite.
        last_step: the highest step in the journal, without steps that a script counts itself unless they are pruned.
    """

    def __init__(self, outbox_dir: Path, step: int) -> None:
        self.latest: dict[str, Point] = {}
        self.num_repeated = 0
        self.num_differing = 0
        self.largest_difference = 0.0
        self.last_step = step
        self._series: dict[str, _Series] = {}
        for key, point, is_own_step in _points(outbox_dir):
            # A script's own step is unrelated to the resume step, so all of these points count as known.
            if (is_own_step or point.step <= step) and (key not in self.latest or self.latest[key].step < point.step):
                self.latest[key] = point
            if is_own_step or point.step >= step:
                self._series.setdefault(key, _Series()).add(point)
            if not is_own_step:
                self.last_step = max(self.last_step, point.step)
        self._pruned = read_pruned(outbox_dir).latest
        for key, pruned in self._pruned.items():
            point = Point(*pruned)
            self.last_step = max(self.last_step, point.step)
            if point.step <= step and (key not in self.latest or self.latest[key].step < point.step):
                self.latest[key] = point

    def match(self, key: str, value: float, step: int) -> Point | None:
        """Return the known point with this name and step and count the repetition, or return None.

        A pruned point is assumed to be equal; its time is `UNKNOWN_TIME_MS`.
        """
        series = self._series.get(key)
        at = None if series is None else series.find(step)
        if series is None or at is None:
            if key not in self._pruned or self._pruned[key][2] < step:
                return None
            self.num_repeated += 1
            return Point(value, UNKNOWN_TIME_MS, step)
        known = Point(series.values[at], series.times_ms[at], step)
        self.num_repeated += 1
        if not key.startswith(_MEASURED) and not _is_same(known.value, value):
            self.num_differing += 1
            self.largest_difference = max(self.largest_difference, _relative_difference(known.value, value))
        return known

    @property
    def facts(self) -> dict[str, str]:
        """The result of the comparison, as facts of the attempt."""
        facts = {"points_repeated": str(self.num_repeated), "points_differing": str(self.num_differing)}
        if self.num_differing:
            facts["largest_relative_difference"] = f"{self.largest_difference:.3g}"
        return facts


def points_at(outbox_dir: Path, metrics: Mapping[str, float], step: int) -> dict[str, Point]:
    """Find the last point up to `step` of each of a checkpoint's metrics, if its value is equal."""
    found: dict[str, Point] = {}
    for key, point, is_own_step in _points(outbox_dir):
        is_before = is_own_step or point.step <= step
        if key in metrics and is_before and (key not in found or found[key].step <= point.step):
            found[key] = point
    for key, pruned in read_pruned(outbox_dir).latest.items():
        if key in metrics and key not in found and pruned[2] <= step:
            found[key] = Point(*pruned)
    return {key: point for key, point in found.items() if point.value == metrics[key]}


def _points(outbox_dir: Path) -> Iterator[tuple[str, Point, bool]]:
    """Yield name, point, and whether the step is counted by a script instead of an optimizer."""
    for entry in read_entries(outbox_dir, kinds=_METRICS):
        for key, value in entry.body["values"].items():
            yield key, Point(value, entry.time_ms, entry.body["step"]), entry.body.get("is_own_step", False)


def _is_same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _relative_difference(one: float, other: float) -> float:
    difference = abs(one - other) / max(abs(one), abs(other))
    return difference if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Logged:
    """Parameters (name -> first value) and keys of checkpoints that earlier attempts have logged."""

    params: Mapping[str, str]
    checkpoints: frozenset[str]


def read_logged(outbox_dir: Path) -> Logged:
    """Read parameters and checkpoints from the journal."""
    params: dict[str, str] = {}
    checkpoints = set()
    for entry in read_entries(outbox_dir, kinds=("params", "checkpoint")):
        if entry.kind == "params":
            params = {**entry.body, **params}
        else:
            checkpoints.add(entry.body["key"])
    pruned = read_pruned(outbox_dir)
    return Logged({**params, **pruned.params}, pruned.checkpoints | checkpoints)


@dataclass(frozen=True)
class Drift:
    """New parameters of this attempt (`added`), and changed ones: name -> first value and current value."""

    added: Mapping[str, str]
    changed: Mapping[str, tuple[str, str]]

    def as_json(self) -> str:
        """Return the changes as JSON that fits into a tag: values are cut, and omitted names are counted."""
        shown = {name: [_cut(value) for value in pair] for name, pair in sorted(self.changed.items())}
        num_omitted = 0
        while len(text := json.dumps(shown | ({"...": num_omitted} if num_omitted else {}))) > MAX_DRIFT_CHARS:
            # Remove an eighth at once, because there may be thousands.
            names = list(shown)
            for name in names[-max(1, len(names) // 8) :]:
                del shown[name]
                num_omitted += 1
        return text

    def as_line(self, num_shown: int = 4) -> str:
        """Return the changes as one line for the terminal."""
        parts = [f"{name} {_cut(old)} -> {_cut(new)}" for name, (old, new) in sorted(self.changed.items())]
        more = f" and {len(parts) - num_shown} more" if len(parts) > num_shown else ""
        return ", ".join(parts[:num_shown]) + more


def drift(logged: Mapping[str, str], now: Mapping[str, str]) -> Drift:
    """Compare parameters with the logged ones; missing ones do not count, because MLflow keeps them."""
    return Drift(
        added={name: value for name, value in now.items() if name not in logged},
        changed={name: (logged[name], value) for name, value in now.items() if logged.get(name, value) != value},
    )


def _cut(value: str, max_chars: int = 200) -> str:
    return value if len(value) <= max_chars else f"{value[: max_chars - 1]}…"
