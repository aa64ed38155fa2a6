from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import pytest

from harness.tracking.journal.logged_points import MAX_DRIFT_CHARS, KnownPoints, Point, drift, points_at, read_logged
from harness.tracking.journal.writer import JournalWriter


@pytest.fixture
def outbox(tmp_path: Path) -> JournalWriter:
    return JournalWriter(tmp_path / "outbox")


def log(outbox: JournalWriter, step: int, time_ms: int, **values: float) -> None:
    outbox.append("metrics", {"step": step, "values": values}, time_ms)


def known(outbox: JournalWriter, step: int) -> KnownPoints:
    return KnownPoints(outbox.path.parent, step)


def test_first_point_is_matched_when_it_is_repeated(outbox: JournalWriter) -> None:
    log(outbox, 10, 100, loss=0.5)
    log(outbox, 20, 200, loss=0.4)
    log(outbox, 20, 900, loss=0.3)  # another attempt's, from before points were compared
    points = known(outbox, 10)
    assert points.match("loss", 0.5, 10) == Point(0.5, 100, 10)
    assert points.match("loss", 0.4, 20) == Point(0.4, 200, 20)
    assert points.match("loss", 0.3, 30) is None
    assert points.match("epoch", 1.0, 20) is None
    assert points.facts == {"points_repeated": "2", "points_differing": "0"}


def test_only_the_last_point_is_known_when_it_is_before_the_step(outbox: JournalWriter) -> None:
    log(outbox, 5, 50, loss=0.9, lr=1.0)
    log(outbox, 10, 100, loss=0.5)
    log(outbox, 20, 200, loss=0.4)
    points = known(outbox, 10)
    assert points.latest == {"loss": Point(0.5, 100, 10), "lr": Point(1.0, 50, 5)}
    assert points.match("loss", 0.9, 5) is None
    assert points.last_step == 20


def test_differences_are_counted_when_values_differ(outbox: JournalWriter) -> None:
    values = {"same": 1.0, "last_bit": 1.0, "double": 1.0, "nan": math.nan, "was_nan": math.nan, "sign": 1.0, "zero": 0}
    log(outbox, 1, 10, **values)
    points = known(outbox, 0)
    again = {**values, "last_bit": math.nextafter(1.0, 2), "double": 2.0, "sign": -1.0}
    for key, value in again.items():
        assert points.match(key, value, 1) is not None
    assert (points.num_repeated, points.num_differing, points.largest_difference) == (7, 3, 2.0)
    points.match("was_nan", 1.0, 1)
    assert (points.num_differing, points.largest_difference) == (4, math.inf)


@pytest.mark.parametrize("key", ["perf/steps_per_s", "checkpoint/copy_s", "system/cpu"])
def test_no_difference_is_counted_when_the_metric_is_a_timing(outbox: JournalWriter, key: str) -> None:
    outbox.append("metrics", {"step": 4, "values": {key: 2.0}}, 10)
    points = known(outbox, 4)
    assert points.match(key, 3.0, 4) == Point(2.0, 10, 4)
    assert points.num_differing == 0


def test_every_point_is_matched_when_steps_are_out_of_order(outbox: JournalWriter) -> None:
    for step in (1, 5, 9, 3, 7, 2):
        log(outbox, step, 10 * step, loss=float(step))
    points = known(outbox, 0)
    assert [points.match("loss", 0.0, step) for step in range(11)] == [
        Point(float(step), 10 * step, step) if step in (1, 2, 3, 5, 7, 9) else None for step in range(11)
    ]


def test_memory_is_bounded_when_the_journal_is_long(outbox: JournalWriter) -> None:
    num_steps = 20_000
    for step in range(num_steps):
        log(outbox, step, step, a=0.1, b=0.2, c=0.3)
    tracemalloc.start()
    points = known(outbox, 0)
    held_bytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert points.last_step == num_steps - 1
    # 24 bytes for each point, plus the arrays' reserve.
    assert held_bytes < 3 * num_steps * 24 * 1.5


def test_points_are_of_the_checkpoints_step_when_looked_up(outbox: JournalWriter) -> None:
    log(outbox, 10, 100, loss=0.5)
    log(outbox, 20, 200, loss=0.4, accuracy=0.9)
    log(outbox, 30, 300, loss=0.3)
    found = points_at(outbox.path.parent, {"loss": 0.4, "accuracy": 0.8, "lr": 1.0}, 25)
    assert found == {"loss": Point(0.4, 200, 20)}


def test_first_parameter_value_is_read_when_attempts_differ(outbox: JournalWriter) -> None:
    outbox.append("params", {"lr": "0.1", "seed": "1"})
    log(outbox, 1, 1, loss=0.5)
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "k1"})
    outbox.append("params", {"lr": "0.2", "new": "x"})
    logged = read_logged(outbox.path.parent)
    assert logged.params == {"lr": "0.1", "seed": "1", "new": "x"}
    assert logged.checkpoints == {"k1"}


def test_drift_has_added_and_changed_when_parameters_differ() -> None:
    found = drift({"lr": "0.1", "seed": "1", "gone": "x"}, {"lr": "0.2", "seed": "1", "steps": "5"})
    assert found.added == {"steps": "5"}
    assert found.changed == {"lr": ("0.1", "0.2")}
    assert json.loads(found.as_json()) == {"lr": ["0.1", "0.2"]}
    assert found.as_line() == "lr 0.1 -> 0.2"


@pytest.mark.parametrize(("num_names", "num_chars"), [(3, 6000), (3000, 10), (3000, 400)])
def test_drift_fits_into_a_tag_when_much_has_changed(num_names: int, num_chars: int) -> None:
    old = {f"task.init_args.parameter_{n}": "ä" * num_chars for n in range(num_names)}
    found = drift(old, dict.fromkeys(old, "b" * num_chars))
    text = found.as_json()
    assert len(text) <= MAX_DRIFT_CHARS
    shown = json.loads(text)
    assert len(shown) - ("..." in shown) + shown.get("...", 0) == num_names
    assert len(shown) > 1
    assert len(found.as_line()) < 3000
