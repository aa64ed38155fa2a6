from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from harness.tracking.journal.delivery_state import Delivered
from harness.tracking.journal.entries import JOURNAL, Entry, journal_end, list_segments, read_entries, sync_segments
from harness.tracking.journal.pruning import prune
from harness.tracking.journal.writer import JournalWriter

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
    """Append all entries and return what should be read back."""
    outbox = JournalWriter(directory)
    expected = []
    for kind, body, time_ms in entries:
        outbox.append(kind, body, time_ms)
        expected.append(Entry(kind, time_ms, body, outbox.path.stat().st_size))
    outbox.close()
    return expected


def in_a_new_directory(check: Callable[[Path], None]) -> None:
    """Run a check in a new directory. A fixture would be shared by all of hypothesis's examples."""
    with TemporaryDirectory() as name:
        check(Path(name) / "outbox")


@given(appended, st.data())
def test_only_whole_entries_are_read_when_the_file_is_truncated(entries: list[Any], data: st.DataObject) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        content = (directory / JOURNAL).read_bytes()
        cut = data.draw(st.integers(0, len(content)))
        (directory / JOURNAL).write_bytes(content[:cut])
        whole = [entry for entry in expected if entry.end_offset <= cut]

        assert list(read_entries(directory)) == whole

        # The next writer removes the incomplete line before it appends its own.
        outbox = JournalWriter(directory)
        assert outbox.path.stat().st_size == (whole[-1].end_offset if whole else 0)
        outbox.append("end", {"status": "FINISHED"}, 7)
        outbox.close()
        after = list(read_entries(directory))
        assert after[:-1] == whole
        assert (after[-1].kind, after[-1].body) == ("end", {"status": "FINISHED"})

    in_a_new_directory(check)


@given(appended.filter(bool), st.data())
def test_damage_is_detected_when_a_byte_is_flipped(entries: list[Any], data: st.DataObject) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        content = bytearray((directory / JOURNAL).read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= data.draw(st.integers(1, 255))
        (directory / JOURNAL).write_bytes(content)
        begins = [0, *(entry.end_offset for entry in expected)]
        # A damaged newline joins two lines, so it damages the next entry too.
        harmed = [i for i, begin in enumerate(begins[:-1]) if begin <= position + 1 and position < begins[i + 1]]
        read = list(read_entries(directory))
        damaged = [entry for entry in read if entry.kind == "damaged"]
        unharmed = [entry for i, entry in enumerate(expected) if i not in harmed]
        assert [entry for entry in read if entry.kind != "damaged"] == unharmed
        # Undetected only if the last line looks incomplete.
        assert damaged or begins[-1] - 1 == position
        assert list(read_entries(directory, kinds=("params", "metrics"))) == [
            entry for entry in unharmed if entry.kind in ("params", "metrics")
        ]

    in_a_new_directory(check)


@given(appended)
def test_only_later_entries_are_read_when_an_offset_is_given(entries: list[Any]) -> None:
    def check(directory: Path) -> None:
        expected = fill(directory, entries)
        for index, entry in enumerate(expected):
            assert list(read_entries(directory, entry.end_offset)) == expected[index + 1 :]

    in_a_new_directory(check)


def test_no_entries_are_read_when_there_is_no_journal(tmp_path: Path) -> None:
    assert list(read_entries(tmp_path)) == []


def test_nan_and_infinity_are_preserved_when_read_back(tmp_path: Path) -> None:
    fill(tmp_path, [("metrics", {"step": 1, "values": {"a": float("nan"), "b": float("-inf")}}, 1)])
    (entry,) = read_entries(tmp_path)
    assert repr(entry.body["values"]) == "{'a': nan, 'b': -inf}"


def test_line_is_ascii_json_when_the_text_is_unicode(tmp_path: Path) -> None:
    fill(tmp_path, [("text", {"name": "ä\n", "content": "\u2028"}, 5)])
    (line,) = (tmp_path / JOURNAL).read_bytes().splitlines()
    assert json.loads(line[9:]) == {"kind": "text", "time_ms": 5, "body": {"name": "ä\n", "content": "\u2028"}}


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


def test_entries_are_contiguous_when_the_journal_has_several_files(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    append_steps(outbox, 1, 50)
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


def test_entries_are_ignored_when_they_follow_a_gap(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    append_steps(outbox, 1, 40)
    outbox.close()
    second = list_segments(tmp_path)[1]
    # A crash of the machine can lose the end of a file although the next file exists.
    with second.path.open("r+b") as stream:
        stream.truncate(second.end - second.begin - 10)
    known = steps(entries(tmp_path))
    assert known == [*range(1, len(known) + 1)]
    assert journal_end(tmp_path) == second.end - 10
    outbox = JournalWriter(tmp_path, MAX_BYTES)
    assert len(list_segments(tmp_path)) == len(list(tmp_path.glob("journal*"))) == 2
    append_steps(outbox, 101, 120)
    assert steps(entries(tmp_path)) == [*known, *range(101, 121)]
    outbox.close()


def test_journal_is_one_file_when_it_is_small(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path)
    append_steps(outbox, 1, 500)
    assert prune(tmp_path, done(outbox.end_offset), 0) == 0
    assert [path.name for path in tmp_path.iterdir()] == [JOURNAL]
    outbox.close()
