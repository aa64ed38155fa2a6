from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.tracking.journal.writer import JournalWriter
from tests.unit.tracking.publisher.fakes import (
    FakeClock,
    FaultyStore,
    Killed,
    end,
    publisher,
)


def begin(outbox: JournalWriter, number: int, time_ms: int, **facts: str) -> None:
    outbox.append("attempt", {"number": number, "facts": facts}, time_ms)


def tags_of(store: FaultyStore) -> dict[str, str]:
    """Return the last value of each tag."""
    return {key: value for name, tags in store.calls if name == "tags" for key, value in tags.items()}


def test_attempt_is_recorded_when_it_begins_and_ends(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000, world_size="2", strategy="ddp")
    outbox.append("metrics", {"step": 7, "values": {"x": 1.0}}, 2000)
    outbox.append("end", {"status": "KILLED", "reason": "stopped by SIGTERM", "step": 8}, 3500)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    prefix = "harness.attempt.1."
    assert {key.removeprefix(prefix): value for key, value in tags_of(store).items() if key.startswith(prefix)} == {
        "started": "1970-01-01T00:00:01.000Z",
        "world_size": "2",
        "strategy": "ddp",
        "ended": "1970-01-01T00:00:03.500Z",
        "status": "KILLED",
        "reason": "stopped by SIGTERM",
        "step_to": "8",
    }
    texts = [value for name, value in store.calls if name == "text"]
    assert texts[-1] == ("attempts.json", (run_dir / "attempts.json").read_text())
    assert json.loads(texts[-1][1])["1"]["status"] == "KILLED"
    assert "reopen" not in store.kinds


def test_run_is_reopened_when_an_attempt_follows_an_end(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox)
    assert publisher(run_dir, FaultyStore()).run()
    begin(outbox, 2, 5000, world_size="4")
    outbox.append("metrics", {"step": 9, "values": {"x": 1.0}}, 6000)
    end(outbox, "KILLED")
    store = FaultyStore()
    assert publisher(run_dir, store, attempt=2).run()
    assert [kind for kind in store.kinds if kind != "text"] == ["reopen", "tags", "metrics", "tags", "end", "tags"]
    assert ("end", ("KILLED", 99)) in store.calls
    assert not [key for key in tags_of(store) if key.startswith("harness.attempt.1.")]  # set before


def test_both_ends_are_recorded_when_the_first_was_undelivered(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox, "FAILED")
    begin(outbox, 2, 5000)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store, attempt=2).run()
    assert [value[0] for name, value in store.calls if name == "end"] == ["FAILED", "FINISHED"]
    assert store.kinds.index("end") < store.kinds.index("reopen")


def test_killed_attempt_ends_when_the_next_one_begins(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("metrics", {"step": 40, "values": {"x": 1.0}}, 4000)
    # The first attempt's publisher was killed too. The next attempt's publisher finds no end.
    begin(outbox, 2, 9000)
    begin(outbox, 2, 9100, step_from="30")
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store, attempt=2).run()
    tags = tags_of(store)
    assert tags["harness.attempt.1.status"] == "FAILED"
    assert tags["harness.attempt.1.ended"] == "1970-01-01T00:00:04.000Z"
    assert tags["harness.attempt.1.step_to"] == "40"
    assert "without saying how" in tags["harness.attempt.1.reason"]
    assert (tags["harness.attempt.2.step_from"], tags["harness.attempt.2.step_to"]) == ("30", "30")
    assert tags["harness.attempt.2.status"] == "FINISHED"


def test_killed_attempt_ends_when_its_publisher_is_alive(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("metrics", {"step": 40, "values": {"x": 1.0}}, 4000)
    store = FaultyStore()
    states = iter([False, True, True])
    assert publisher(run_dir, store, exited=lambda: next(states)).run()
    assert tags_of(store)["harness.attempt.1.status"] == "FAILED"
    assert tags_of(store)["harness.attempt.1.step_to"] == "40"
    assert tags_of(store)["harness.attempt.1.ended"] > "2020"  # the time when the exit was noticed


def test_publisher_stops_when_the_next_attempt_has_begun(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("tags", {"a": "b"}, 2000)
    begin(outbox, 2, 3000)
    outbox.append("tags", {"c": "d"}, 4000)
    old = FaultyStore()
    assert not publisher(run_dir, old, exited=lambda: True).run()
    assert "a" in tags_of(old)
    assert not {"c", "harness.end_reason"} & tags_of(old).keys()
    end(outbox)
    new = FaultyStore()
    assert publisher(run_dir, new, attempt=2).run()
    assert tags_of(new)["c"] == "d"
    assert not {"a"} & tags_of(new).keys()


def test_tags_are_set_again_when_killed_before_the_record(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox)
    begin(outbox, 2, 5000)
    end(outbox)
    first = FaultyStore(*[None] * 7, ("stored", Killed()))  # attempt 2's tags: stored, never recorded
    with pytest.raises(Killed):
        publisher(run_dir, first, attempt=2).run()
    second = FaultyStore()
    assert publisher(run_dir, second, attempt=2).run()
    assert second.kinds[:2] == ["reopen", "tags"]
    assert tags_of(second)["harness.attempt.2.started"] == "1970-01-01T00:00:05.000Z"


def test_run_ends_when_the_artifact_store_is_unreachable(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox)
    store = FaultyStore(None, ConnectionError("no artifacts"), None, None, None, ConnectionError("no artifacts"))
    clock = FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["tags", "tags", "end", "tags"]
    assert clock.pauses_s == []
