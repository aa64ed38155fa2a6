"""The journal in several files: bounded, and never without what is needed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import JOURNAL, Entry, journal_end, list_segments, read_entries, sync_segments
from harness.tracking.journal.logged_points import UNKNOWN_TIME_MS, KnownPoints, Point, points_at, read_logged
from harness.tracking.journal.pruning import prune, read_pruned
from harness.tracking.journal.writer import JournalWriter

MAX_BYTES = 8000  # files of 500 bytes, of some eight entries


def entries(directory: Path, offset: int = 0) -> list[Entry]:
    return list(read_entries(directory, offset))


def steps(found: list[Entry]) -> list[int]:
    return [entry.body["step"] for entry in found if entry.kind == "metrics"]


def fill(outbox: JournalWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        outbox.append("metrics", {"step": step, "values": {"loss": step / 8}}, 1000 + step)


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("journal*"))


def done(offset: int) -> Delivered:
    return Delivered(offset=offset, models_offset=offset)


def test_large_journal_is_in_several_files_and_reads_as_one(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    fill(outbox, 1, 50)
    outbox.sync()
    found = entries(tmp_path)
    assert steps(found) == [*range(1, 51)]
    assert len(list_segments(tmp_path)) > 3
    assert {path.name for path in tmp_path.glob("journal*")} == {each.path.name for each in list_segments(tmp_path)}
    assert (
        found[-1].end_offset == outbox.end_offset == journal_end(tmp_path) == sync_segments(list_segments(tmp_path), 0)
    )
    for entry in found:
        assert steps(entries(tmp_path, entry.end_offset)) == [*range(entry.body["step"] + 1, 51)]
        assert steps(list(read_entries(tmp_path, 0, end=entry.end_offset))) == [*range(1, entry.body["step"] + 1)]
    outbox.close()


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
def test_what_is_not_delivered_stays_in_its_order_whatever_happens(actions: list[tuple[str, float]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        outbox, step, offset = JournalWriter(directory, MAX_BYTES), 0, 0
        written: list[int] = []
        for action, amount in actions:
            if action == "append":
                for _ in range(int(amount)):
                    step += 1
                    left_out = outbox.num_dropped
                    fill(outbox, step, step)
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


def test_metrics_alone_are_left_out_when_the_journal_is_full_and_come_again_once_there_is_room(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    fill(outbox, 1, 300)
    num_dropped = outbox.num_dropped
    assert num_dropped > 100
    assert outbox.problem is not None
    assert "tracking.max_outbox_size" in outbox.problem
    outbox.append("checkpoint", {"name": "step-300", "key": "k"})
    assert [entry.kind for entry in entries(tmp_path)][-1] == "checkpoint"
    assert steps(entries(tmp_path)) == [*range(1, 301 - num_dropped)]
    assert prune(tmp_path, done(outbox.end_offset), MAX_BYTES // 2) > 3
    outbox._next_check_s = 0.0  # looked at once a second
    fill(outbox, 301, 310)
    assert steps(entries(tmp_path))[-10:] == [*range(301, 311)]
    assert (outbox.num_dropped, outbox.problem) == (num_dropped, None)
    outbox.close()


@pytest.mark.parametrize("lane", ["offset", "models_offset"])
def test_nothing_is_pruned_that_one_of_the_lanes_has_not_passed(tmp_path: Path, lane: str) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    fill(outbox, 1, 40)
    behind = list_segments(tmp_path)[1].end - 1
    delivered = Delivered(**{"offset": outbox.end_offset, "models_offset": outbox.end_offset, lane: behind})
    assert prune(tmp_path, delivered, 0) == 1
    assert list_segments(tmp_path)[0].begin <= behind < list_segments(tmp_path)[0].end
    assert prune(tmp_path, done(outbox.end_offset), 0) > 2
    # The one that is written to stays.
    assert [each.path for each in list_segments(tmp_path)] == [outbox.path]
    outbox.close()


def test_next_attempt_knows_what_was_pruned(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    outbox.append("params", {"lr": "0.1"})
    outbox.append("checkpoint", {"name": "step-1", "key": "first"})
    fill(outbox, 1, 60)
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
    # The entry itself is gone, so what time it had is not known any more; behind them all is as ever.
    assert known.match("loss", 1.5, last - 3) == Point(1.5, UNKNOWN_TIME_MS, last - 3)
    assert known.match("loss", 60 / 8, 60) in (Point(60 / 8, 1060, 60), Point(60 / 8, UNKNOWN_TIME_MS, 60))
    assert known.match("loss", 61 / 8, 61) is None
    assert known.match("another", 1.0, 3) is None
    assert KnownPoints(tmp_path, last).latest["loss"] == Point(value, time_ms, last)
    assert points_at(tmp_path, {"loss": value}, last) == {"loss": Point(value, time_ms, last)}


def test_what_is_behind_a_gap_is_not_there(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    fill(outbox, 1, 40)
    outbox.close()
    second = list_segments(tmp_path)[1]
    # As a crash of the machine leaves it: the end of a file is lost, and the next one is there.
    with second.path.open("r+b") as stream:
        stream.truncate(second.end - second.begin - 10)
    known = steps(entries(tmp_path))
    assert known == [*range(1, len(known) + 1)]
    assert journal_end(tmp_path) == second.end - 10
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    assert len(list_segments(tmp_path)) == len(list(tmp_path.glob("journal*"))) == 2
    fill(outbox, 101, 120)
    assert steps(entries(tmp_path)) == [*known, *range(101, 121)]
    outbox.close()


def test_small_journal_is_one_file_with_a_plain_name(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)
    fill(outbox, 1, 500)
    assert prune(tmp_path, done(outbox.end_offset), 0) == 0
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    outbox.close()
