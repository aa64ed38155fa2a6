"""A bounded journal: delivered files are removed, and undelivered entries are kept."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import Entry, list_segments, read_entries
from harness.tracking.journal.logged_points import UNKNOWN_TIME_MS, KnownPoints, Point, points_at, read_logged
from harness.tracking.journal.pruning import count_lost_bytes, prune, read_pruned
from harness.tracking.journal.writer import JournalWriter

MAX_BYTES = 8000  # files of 500 bytes, of some eight entries


def entries(directory: Path, offset: int = 0) -> list[Entry]:
    return list(read_entries(directory, offset))


def steps(found: list[Entry]) -> list[int]:
    return [entry.body["step"] for entry in found if entry.kind == "metrics"]


def append_steps(outbox: JournalWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        outbox.append("metrics", {"step": step, "values": {"loss": step / 8}}, 1000 + step)


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("journal*"))


def done(offset: int) -> Delivered:
    return Delivered(offset=offset, models_offset=offset)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 60)),
            st.tuples(st.just("deliver"), st.floats(0, 1)),
            st.tuples(st.just("prune"), st.integers(0, 6000)),
            st.tuples(st.just("open again"), st.none()),
        ),
        max_size=25,
    )
)
def test_undelivered_entries_are_kept_when_the_journal_is_pruned(actions: list[tuple[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        outbox, step, offset = JournalWriter(directory, MAX_BYTES), 0, 0
        written: list[int] = []
        for action, amount in actions:
            if action == "append":
                for _ in range(int(amount)):
                    step += 1
                    left_out = outbox.num_dropped
                    append_steps(outbox, step, step)
                    if outbox.num_dropped == left_out:
                        written.append(step)
            elif action == "deliver":
                waiting = entries(directory, offset)
                if taken := waiting[: round(amount * len(waiting))]:
                    offset = taken[-1].end_offset
                    del written[: len(taken)]
            elif action == "prune":
                prune(directory, done(offset), int(amount))
            else:
                outbox.close()
                outbox = JournalWriter(directory, MAX_BYTES)
            assert steps(entries(directory, offset)) == written
            assert size_bytes(directory) < MAX_BYTES + 200
            known = KnownPoints(directory, 0)
            missing = [each for each in range(1, step + 1) if known.match("loss", each / 8, each) is None]
            assert set(missing).isdisjoint(written)
        outbox.close()


@pytest.mark.parametrize("field", ["offset", "models_offset"])
def test_segment_is_kept_when_one_offset_is_before_its_end(tmp_path: Path, field: str) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    append_steps(outbox, 1, 40)
    behind = list_segments(tmp_path)[1].end - 1
    delivered = Delivered(**{"offset": outbox.end_offset, "models_offset": outbox.end_offset, field: behind})
    assert prune(tmp_path, delivered, 0) == 1
    assert list_segments(tmp_path)[0].begin <= behind < list_segments(tmp_path)[0].end
    assert prune(tmp_path, done(outbox.end_offset), 0) > 2
    # The file that is written to is kept.
    assert [each.path for each in list_segments(tmp_path)] == [outbox.path]
    outbox.close()


def test_pruned_entries_are_known_when_the_next_attempt_starts(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    outbox.append("params", {"lr": "0.1"})
    outbox.append("checkpoint", {"name": "step-1", "key": "first"})
    append_steps(outbox, 1, 60)
    outbox.append("params", {"lr": "0.2", "seed": "17"})
    outbox.append("checkpoint", {"name": "step-60", "key": "second"})
    assert prune(tmp_path, done(outbox.end_offset), 0)
    outbox.close()
    logged = read_logged(tmp_path)
    assert (dict(logged.params), logged.checkpoints) == ({"lr": "0.1", "seed": "17"}, {"first", "second"})
    value, time_ms, last = read_pruned(tmp_path).latest["loss"]
    assert (value, time_ms) == (last / 8, 1000 + last)
    known = KnownPoints(tmp_path, last - 5)
    assert known.last_step == 60
    # The time of a pruned point is unknown. Later points are unaffected.
    assert known.match("loss", 1.5, last - 3) == Point(1.5, UNKNOWN_TIME_MS, last - 3)
    assert known.match("loss", 60 / 8, 60) in (Point(60 / 8, 1060, 60), Point(60 / 8, UNKNOWN_TIME_MS, 60))
    assert known.match("loss", 61 / 8, 61) is None
    assert known.match("another", 1.0, 3) is None
    assert KnownPoints(tmp_path, last).latest["loss"] == Point(value, time_ms, last)
    assert points_at(tmp_path, {"loss": value}, last) == {"loss": Point(value, time_ms, last)}


def test_bytes_are_lost_when_they_were_removed_but_not_pruned(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, max_bytes=2_000)
    for step in range(12):
        outbox.append("params", {f"p{step}": "1"})
    outbox.sync()
    outbox.close()
    first, second, *_ = list_segments(tmp_path)
    assert count_lost_bytes(tmp_path, list_segments(tmp_path), 0) == 0
    prune(tmp_path, Delivered(offset=first.end, models_offset=first.end), 0)
    assert count_lost_bytes(tmp_path, list_segments(tmp_path), 0) == 0
    second.path.unlink()
    assert count_lost_bytes(tmp_path, list_segments(tmp_path), 0) == second.end - second.begin
    assert count_lost_bytes(tmp_path, list_segments(tmp_path), second.end) == 0
