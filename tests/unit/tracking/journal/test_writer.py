from __future__ import annotations

import os
import resource
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from harness.errors import TrackingError
from harness.tracking.journal import writer as outbox_module
from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import JOURNAL, Entry, read_entries
from harness.tracking.journal.pruning import prune
from harness.tracking.journal.writer import DEFAULT_MAX_BYTES, JournalWriter


def fill(directory: Path, entries: list[Any]) -> list[Entry]:
    """Append all; what should be read back."""
    outbox = JournalWriter(directory)
    expected = []
    for kind, body, time_ms in entries:
        outbox.append(kind, body, time_ms)
        expected.append(Entry(kind, time_ms, body, outbox.path.stat().st_size))
    outbox.close()
    return expected


@pytest.mark.parametrize("removal", ["file", "directory", "move"])
def test_journal_is_restored_when_it_is_removed_during_the_run(tmp_path: Path, removal: str) -> None:
    directory = tmp_path / "outbox"
    outbox = JournalWriter(directory)
    for step in range(4):
        outbox.append("metrics", {"step": step, "values": {"loss": 1.0}})
        if step == 1 and removal == "move":
            outbox.path.rename(tmp_path / "elsewhere.jsonl")
        elif step == 1:
            shutil.rmtree(directory) if removal == "directory" else outbox.path.unlink()
    outbox.sync()
    outbox.append("metrics", {"step": 4, "values": {"loss": 1.0}})
    outbox.sync()
    assert [entry.body["step"] for entry in read_entries(directory)] == [*range(5)]
    assert [path.name for path in directory.iterdir()] == [JOURNAL]
    (line,) = outbox.warnings
    assert line.startswith(f"{outbox.path}: was removed while the run is training")
    outbox.close()


def test_all_open_files_are_restored_when_they_are_removed(tmp_path: Path) -> None:
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


def test_sync_does_nothing_when_the_writer_is_closed(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    outbox.append("params", {"p": "1"})
    outbox.close()
    outbox.path.unlink()
    with (tmp_path / "other").open("wb") as other:  # which has the closed file's number, likely
        outbox.sync()
        outbox.close()
        other.write(b"x")
    assert not outbox.path.exists()


@pytest.mark.parametrize("length", [65_534, 65_535, 65_536, 65_537, 200_000])
def test_incomplete_line_is_removed_when_it_is_longer_than_a_block(tmp_path: Path, length: int) -> None:
    (whole,) = fill(tmp_path, [("tags", {"a": "b"}, 1)])
    with (tmp_path / JOURNAL).open("ab") as stream:
        stream.write(b"x" * length)
    JournalWriter(tmp_path).close()
    assert (tmp_path / JOURNAL).stat().st_size == whole.end_offset
    assert list(read_entries(tmp_path)) == [whole]


def test_journal_is_empty_when_its_only_line_is_incomplete(tmp_path: Path) -> None:
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
def test_entries_are_kept_in_order_when_the_disk_is_full(tmp_path: Path, extra_bytes: int) -> None:
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


def test_only_metrics_are_dropped_when_memory_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_error_has_path_and_reason_when_truncation_fails_too(tmp_path: Path) -> None:
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


def test_error_has_the_path_when_the_directory_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match=r"file/outbox/journal\.jsonl: cannot open the outbox"):
        JournalWriter(tmp_path / "file" / "outbox")


def test_entry_is_ignored_when_it_follows_the_end(tmp_path: Path) -> None:
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
def test_append_does_not_block_when_another_thread_syncs(
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


MAX_BYTES = 8000  # files of 500 bytes, of some eight entries


def entries(directory: Path, offset: int = 0) -> list[Entry]:
    return list(read_entries(directory, offset))


def steps(found: list[Entry]) -> list[int]:
    return [entry.body["step"] for entry in found if entry.kind == "metrics"]


def append_steps(outbox: JournalWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        outbox.append("metrics", {"step": step, "values": {"loss": step / 8}}, 1000 + step)


def done(offset: int) -> Delivered:
    return Delivered(offset=offset, models_offset=offset)


def test_only_metrics_are_dropped_when_the_journal_is_full(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    append_steps(outbox, 1, 300)
    num_dropped = outbox.num_dropped
    assert num_dropped > 100
    assert outbox.problem is not None
    assert "tracking.max_outbox_size" in outbox.problem
    outbox.append("checkpoint", {"name": "step-300", "key": "k"})
    assert [entry.kind for entry in entries(tmp_path)][-1] == "checkpoint"
    assert steps(entries(tmp_path)) == [*range(1, 301 - num_dropped)]
    assert prune(tmp_path, done(outbox.end_offset), MAX_BYTES // 2) > 3
    outbox._next_check_s = 0.0  # looked at once a second
    append_steps(outbox, 301, 310)
    assert steps(entries(tmp_path))[-10:] == [*range(301, 311)]
    assert (outbox.num_dropped, outbox.problem) == (num_dropped, None)
    outbox.close()
