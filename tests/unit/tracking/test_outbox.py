from __future__ import annotations

import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import TrackingError
from harness.tracking.journal import writer as outbox_module
from harness.tracking.journal.delivery_state import Delivered, read_delivered, write_delivered
from harness.tracking.journal.entries import JOURNAL, Entry, list_segments, read_entries
from harness.tracking.journal.pruning import count_lost_bytes, prune
from harness.tracking.journal.writer import DEFAULT_MAX_BYTES, JournalWriter

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.text(' \n\r\u2028\x00"\\ä', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(st.text(max_size=8), values, max_size=4)
kinds = st.sampled_from(["params", "tags", "metrics", "dataset", "text", "checkpoint", "end"])
appended = st.lists(st.tuples(kinds, bodies, st.integers(0, 2**45)), max_size=6)


def fill(directory: Path, entries: list[Any]) -> list[Entry]:
    """Append all; what should be read back."""
    outbox = JournalWriter(directory)
    expected = []
    for kind, body, time_ms in entries:
        outbox.append(kind, body, time_ms)
        expected.append(Entry(kind, time_ms, body, outbox.path.stat().st_size))
    outbox.close()
    return expected


def in_a_new_directory(check: Callable[[Path], None]) -> None:
    """For hypothesis, where a fixture would be shared by all examples."""
    with TemporaryDirectory() as name:
        check(Path(name) / "outbox")


@pytest.mark.parametrize("takes", ["file", "directory", "moves"])
def test_journal_is_there_again_when_it_was_removed_while_it_is_written(tmp_path: Path, takes: str) -> None:
    directory = tmp_path / "outbox"
    outbox = JournalWriter(directory)
    for step in range(4):
        outbox.append("metrics", {"step": step, "values": {"loss": 1.0}})
        if step == 1 and takes == "moves":
            outbox.path.rename(tmp_path / "elsewhere.jsonl")
        elif step == 1:
            shutil.rmtree(directory) if takes == "directory" else outbox.path.unlink()
    outbox.sync()
    outbox.append("metrics", {"step": 4, "values": {"loss": 1.0}})
    outbox.sync()
    assert [entry.body["step"] for entry in read_entries(directory)] == [*range(5)]
    assert [path.name for path in directory.iterdir()] == [JOURNAL]
    (line,) = outbox.warnings
    assert line.startswith(f"{outbox.path}: was removed while the run is training")
    outbox.close()


def test_every_open_file_is_there_again_when_the_journal_of_several_was_removed(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, max_bytes=2_000)
    for step in range(12):
        outbox.append("params", {f"p{step}": "1"})
    there = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert len(there) > 2
    for name in there:
        (tmp_path / name).unlink()
    outbox.sync()
    assert sorted(path.name for path in tmp_path.iterdir()) == there
    assert len(list(read_entries(tmp_path))) == 12
    outbox.close()


def test_nothing_is_done_when_a_closed_outbox_is_synced(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    outbox.append("params", {"p": "1"})
    outbox.close()
    outbox.path.unlink()
    with (tmp_path / "other").open("wb") as other:  # which has the closed file's number, likely
        outbox.sync()
        outbox.close()
        other.write(b"x")
    assert not outbox.path.exists()


def test_bytes_are_counted_as_lost_when_they_were_not_removed_by_the_publisher(tmp_path: Path) -> None:
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


@given(appended, st.data())
def test_whole_entries_alone_are_read_when_the_file_is_cut_anywhere(entries: list[Any], data: st.DataObject) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        content = (directory / JOURNAL).read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        (directory / JOURNAL).write_bytes(content[:cut])
        whole = [entry for entry in expected if entry.end_offset <= cut]

        assert list(read_entries(directory)) == whole

        # Another writer takes the torn line off, and its own line is whole.
        outbox = JournalWriter(directory)
        assert outbox.path.stat().st_size == (whole[-1].end_offset if whole else 0)
        outbox.append("end", {"status": "FINISHED"}, 7)
        outbox.close()
        after = list(read_entries(directory))
        assert after[:-1] == whole
        assert (after[-1].kind, after[-1].body) == ("end", {"status": "FINISHED"})

    in_a_new_directory(check)


@given(appended.filter(bool), st.data())
def test_wrong_entry_is_never_read_when_a_byte_is_flipped(entries: list[Any], data: st.DataObject) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        content = bytearray((directory / JOURNAL).read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        (directory / JOURNAL).write_bytes(content)
        begins = [0, *(entry.end_offset for entry in expected)]
        # A newline is of the next entry's line too.
        harmed = [i for i, begin in enumerate(begins[:-1]) if begin <= position + 1 and position < begins[i + 1]]
        read = list(read_entries(directory))
        damaged = [entry for entry in read if entry.kind == "damaged"]
        unharmed = [entry for i, entry in enumerate(expected) if i not in harmed]
        assert [entry for entry in read if entry.kind != "damaged"] == unharmed
        # Untold only where the end looks like a line that was being written.
        assert damaged or begins[-1] - 1 == position
        assert list(read_entries(directory, kinds=("params", "metrics"))) == [
            entry for entry in unharmed if entry.kind in ("params", "metrics")
        ]

    in_a_new_directory(check)


@given(appended)
def test_rest_alone_is_read_when_an_offset_is_given(entries: list[Any]) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        for index, entry in enumerate(expected):
            assert list(read_entries(directory, entry.end_offset)) == expected[index + 1 :]

    in_a_new_directory(check)


def test_nothing_is_read_when_there_is_no_journal(tmp_path: Path) -> None:
    assert list(read_entries(tmp_path)) == []


@pytest.mark.parametrize("length", [65_534, 65_535, 65_536, 65_537, 200_000])
def test_torn_line_is_taken_off_when_it_is_longer_than_a_block(tmp_path: Path, length: int) -> None:
    (whole,) = fill(tmp_path, [("tags", {"a": "b"}, 1)])
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(b"x" * length)
    JournalWriter(tmp_path).close()
    assert (tmp_path / JOURNAL).stat().st_size == whole.end_offset
    assert list(read_entries(tmp_path)) == [whole]


def test_journal_is_empty_when_its_only_line_is_torn(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b"x" * 100_000)
    JournalWriter(tmp_path).close()
    assert (tmp_path / JOURNAL).read_bytes() == b""


def test_time_is_now_when_none_is_given(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)
    stamps = [outbox.append("metrics", {"step": step, "values": {}}) for step in range(3)]
    outbox.sync()
    outbox.close()
    assert [entry.time_ms for entry in read_entries(tmp_path)] == stamps == sorted(stamps)


def test_entries_are_whole_when_threads_append_together(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)

    def append(thread: int) -> None:
        for index in range(50):
            outbox.append("metrics", {"thread": thread, "index": index, "padding": "x" * 3000})

    threads = [threading.Thread(target=append, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outbox.close()
    read = [(entry.body["thread"], entry.body["index"]) for entry in read_entries(tmp_path)]
    assert len(read) == 200
    for number in range(4):
        assert [index for thread, index in read if thread == number] == list(range(50))


def test_nan_and_infinity_are_kept_when_a_metric_is_one(tmp_path: Path) -> None:
    fill(tmp_path, [("metrics", {"step": 1, "values": {"a": float("nan"), "b": float("-inf")}}, 1)])
    (entry,) = read_entries(tmp_path)
    assert repr(entry.body["values"]) == "{'a': nan, 'b': -inf}"


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """The system refuses what lies behind it, after writing what lies before: as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("extra_bytes", [0, 1, 60])
def test_entries_wait_in_their_order_when_the_disk_is_full_in_the_middle_of_one(
    tmp_path: Path, extra_bytes: int
) -> None:
    (first,) = fill(tmp_path, [("tags", {"a": "b"}, 1)])
    outbox = JournalWriter(tmp_path)
    with file_size_limit(first.end_offset + extra_bytes):
        outbox.append("tags", {"long": "x" * 100}, 2)
        outbox.append("tags", {"c": "d"}, 3)
        assert outbox.problem is not None
        assert outbox.problem.startswith(f"{outbox.path}: cannot append to the outbox: ")
        assert "2 entries are kept in memory" in outbox.problem
        with pytest.raises(TrackingError, match="free space there"):
            outbox.sync()
    assert outbox.path.stat().st_size == first.end_offset
    outbox.append("tags", {"e": "f"}, 4)
    assert outbox.problem is None
    outbox.sync()
    outbox.close()
    written = [(entry.body, entry.time_ms) for entry in read_entries(tmp_path)]
    assert written == [({"a": "b"}, 1), ({"long": "x" * 100}, 2), ({"c": "d"}, 3), ({"e": "f"}, 4)]


def test_metrics_alone_are_left_out_and_counted_when_too_much_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_PENDING_BYTES", 300)
    outbox = JournalWriter(tmp_path)
    with file_size_limit(0):
        for step in range(10):
            outbox.append("metrics", {"step": step, "values": {"loss": 1.0}}, step)
        outbox.append("end", {"status": "FINISHED"}, 10)
    outbox.sync()
    entries = list(read_entries(tmp_path))
    steps = [entry.body["step"] for entry in entries if entry.kind == "metrics"]
    assert steps == [*range(len(steps))]
    assert entries[-1].kind == "end"
    assert (outbox.num_dropped, len(steps) > 0) == (10 - len(steps), True)


def test_error_has_path_and_reason_when_not_even_taking_back_works(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)
    (journal,) = (int(each.name) for each in Path("/proc/self/fd").iterdir() if is_link_to(each, tmp_path / JOURNAL))
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), journal)
    outbox.append("tags", {"a": "b"})
    with pytest.raises(TrackingError, match=rf"{tmp_path}/{JOURNAL}: .*No space left"):
        outbox.sync()


def is_link_to(link: Path, target: Path) -> bool:
    try:
        return os.readlink(link) == str(target)
    except FileNotFoundError:  # the descriptor by which the directory is read
        return False


def test_error_has_the_path_when_the_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match=r"file/outbox/journal\.jsonl: cannot open the outbox"):
        JournalWriter(tmp_path / "file" / "outbox")


def test_record_is_empty_when_nothing_was_delivered(tmp_path: Path) -> None:
    assert read_delivered(tmp_path) == Delivered(0, {}, ())


def test_record_reads_back_the_same_when_written(tmp_path: Path) -> None:
    (entry,) = fill(tmp_path, [("end", {}, 7)])
    record = Delivered(
        entry.end_offset, {"epoch-0001": "m-1"}, ("tags: no",), ended=True, time_ms=7, models_offset=0, num_refused=1
    )
    write_delivered(tmp_path, Delivered(1, {}, ()))
    write_delivered(tmp_path, record)
    assert read_delivered(tmp_path) == record
    assert sorted(os.listdir(tmp_path)) == ["delivered.json", JOURNAL]


def test_lines_are_ascii_text_when_read_by_hand(tmp_path: Path) -> None:
    fill(tmp_path, [("text", {"name": "ä\n", "content": "\u2028"}, 5)])
    (line,) = (tmp_path / JOURNAL).read_bytes().splitlines()
    assert json.loads(line[9:]) == {"kind": "text", "time_ms": 5, "body": {"name": "ä\n", "content": "\u2028"}}


def test_nothing_is_written_behind_the_end_by_a_thread_that_is_late(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)
    outbox.append("end", {"status": "FINISHED"}, 1)
    outbox.append("system", {"step": 1, "values": {"system/cpu": 1.0}}, 2)
    outbox.close()
    # The number of the file that was closed is another file's now.
    with (tmp_path / "another").open("wb"):
        outbox.append("metrics", {"step": 1, "values": {"loss": 1.0}}, 3)
    assert [entry.kind for entry in read_entries(tmp_path)] == ["end"]
    assert (tmp_path / "another").read_bytes() == b""


@pytest.mark.parametrize("max_bytes", [DEFAULT_MAX_BYTES, 1600], ids=["one file", "several files"])
def test_append_does_not_wait_when_another_thread_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int
) -> None:
    outbox = JournalWriter(tmp_path, max_bytes)
    is_waiting, may_end = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow_fsync(file: int) -> None:
        is_waiting.set()
        assert may_end.wait(60)
        fsync(file)

    for step in range(3):
        outbox.append("metrics", {"step": step, "values": {"loss": 0.5}})
    monkeypatch.setattr(os, "fsync", slow_fsync)
    with ThreadPoolExecutor(2) as threads:
        try:
            synced = threads.submit(outbox.sync)
            assert is_waiting.wait(60)
            threads.submit(outbox.append, "metrics", {"step": 3, "values": {"loss": 0.5}}).result(20)
            assert not synced.done()
        finally:
            may_end.set()
        synced.result(60)
    # What came meanwhile is the next one's; nothing is closed that is still needed.
    outbox.sync()
    assert [entry.body["step"] for entry in read_entries(tmp_path)] == [0, 1, 2, 3]
    outbox.close()
