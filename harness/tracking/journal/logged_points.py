"""What earlier attempts at a run have logged, read back from the journal, which stays on disk.

What is repeated since the checkpoint that a run goes on from is there already: a point that MLflow has is
not sent again, and a parameter that it would refuse to change is told as drift.
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

# What is measured by the clock: its points differ each time, and that says nothing about the training.
_MEASURED = ("perf/", "checkpoint/", "system/")
# MLflow takes 8000 characters of a tag's value, and our store counts alike.
MAX_DRIFT_CHARS = 7900


_METRICS: Final[tuple[Kind, ...]] = ("metrics",)


# Of a point whose entry is gone from the journal.
UNKNOWN_TIME_MS = -1


class Point(NamedTuple):
    """One point of a metric: its value, its time in milliseconds since the epoch, its optimizer step."""

    value: float
    time_ms: int
    step: int


@dataclass
class _Series:
    """The points of one metric, by step: 24 bytes for each."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    times_ms: array[int] = field(default_factory=lambda: array("q"))

    def find(self, step: int) -> int | None:
        at = bisect_left(self.steps, step)
        return at if at < len(self.steps) and self.steps[at] == step else None

    def add(self, point: Point) -> None:
        at = bisect_left(self.steps, point.step)
        if at == len(self.steps) or self.steps[at] != point.step:  # the first stays
            # At the end nearly always, since training counts up.
            self.steps.insert(at, point.step)
            self.values.insert(at, point.value)
            self.times_ms.insert(at, point.time_ms)


class KnownPoints:
    """The points that MLflow has, or will have, from a step on; and what repeating them has shown.

    Effects: not collective; the constructor reads the journal once (5 to 8 s and 26 MB for a million points), main
    thread; nothing on disk.

    Args:
        outbox_dir: the journal's directory.
        step: the optimizer step that training goes on from.

    Attributes:
        latest: name -> the last point at or before `step`.
        num_repeated: points that came again.
        num_differing: those of them that had another value; measured times are not counted.
        largest_difference: of those, relative to the larger magnitude, 0 to 2; infinite where one was no number.
        last_step: of all that is known.
    """

    def __init__(self, outbox_dir: Path, step: int) -> None:
        self.latest: dict[str, Point] = {}
        self.num_repeated = 0
        self.num_differing = 0
        self.largest_difference = 0.0
        self.last_step = step
        self._series: dict[str, _Series] = {}
        for key, point, is_own_step in _points(outbox_dir):
            # A script's own counting says nothing of where it goes on: all of those are known.
            if (is_own_step or point.step <= step) and (key not in self.latest or self.latest[key].step < point.step):
                self.latest[key] = point
            if is_own_step or point.step >= step:
                self._series.setdefault(key, _Series()).add(point)
            if not is_own_step:
                self.last_step = max(self.last_step, point.step)
        # Of what is gone from the journal, the last step of each metric: it has logged up to there.
        self._pruned = read_pruned(outbox_dir).latest
        for key, gone in self._pruned.items():
            point = Point(*gone)
            self.last_step = max(self.last_step, point.step)
            if point.step <= step and (key not in self.latest or self.latest[key].step < point.step):
                self.latest[key] = point

    def take(self, key: str, value: float, step: int) -> Point | None:
        """The point that is there already under this name and step, which is counted; or None.

        One that is so old that its entry is gone is taken for the same, at a time that is not known any more.
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
        """What repeating has shown, as an attempt's facts."""
        facts = {"points_repeated": str(self.num_repeated), "points_differing": str(self.num_differing)}
        if self.num_differing:
            facts["largest_relative_difference"] = f"{self.largest_difference:.3g}"
        return facts


def points_at(outbox_dir: Path, metrics: Mapping[str, float], step: int) -> dict[str, Point]:
    """The points that a checkpoint's metrics are: under each name the last one up to its step, of that value."""
    found: dict[str, Point] = {}
    for key, point, is_own_step in _points(outbox_dir):
        is_before = is_own_step or point.step <= step
        if key in metrics and is_before and (key not in found or found[key].step <= point.step):
            found[key] = point
    for key, gone in read_pruned(outbox_dir).latest.items():
        if key in metrics and key not in found and gone[2] <= step:
            found[key] = Point(*gone)
    return {key: point for key, point in found.items() if point.value == metrics[key]}


def _points(outbox_dir: Path) -> Iterator[tuple[str, Point, bool]]:
    """Name, point, and whether its step is of a script's own counting."""
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
    """What earlier attempts have put into the journal.

    Args:
        params: name -> text, as it was first.
        checkpoints: the keys of the checkpoints.
    """

    params: Mapping[str, str]
    checkpoints: frozenset[str]


def read_logged(outbox_dir: Path) -> Logged:
    """Read the journal once."""
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
    """How the parameters are others than they were.

    Args:
        added: those that there were not.
        changed: name -> what it was first, and what it is now.
    """

    added: Mapping[str, str]
    changed: Mapping[str, tuple[str, str]]

    def as_json(self) -> str:
        """What has changed, in a tag's length: values are cut, and then the last names left out and counted."""
        shown = {name: [_cut(value) for value in pair] for name, pair in sorted(self.changed.items())}
        num_left_out = 0
        while len(text := json.dumps(shown | ({"...": num_left_out} if num_left_out else {}))) > MAX_DRIFT_CHARS:
            # A share of them at once: there may be thousands.
            names = list(shown)
            for name in names[-max(1, len(names) // 8) :]:
                del shown[name]
                num_left_out += 1
        return text

    def as_line(self, num_shown: int = 4) -> str:
        """What has changed, for the terminal."""
        parts = [f"{name} {_cut(old)} -> {_cut(new)}" for name, (old, new) in sorted(self.changed.items())]
        more = f" and {len(parts) - num_shown} more" if len(parts) > num_shown else ""
        return ", ".join(parts[:num_shown]) + more


def drift(logged: Mapping[str, str], now: Mapping[str, str]) -> Drift:
    """Compare the parameters with those that were logged. One that is no longer there is no drift: MLflow keeps it."""
    return Drift(
        added={name: value for name, value in now.items() if name not in logged},
        changed={name: (logged[name], value) for name, value in now.items() if logged.get(name, value) != value},
    )


def _cut(value: str, max_chars: int = 200) -> str:
    return value if len(value) <= max_chars else f"{value[: max_chars - 1]}…"
