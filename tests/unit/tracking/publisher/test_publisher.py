from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.tracking.journal.delivery_state import DELIVERED, MAX_REFUSED_KEPT, read_delivered
from harness.tracking.journal.entries import read_entries
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import WantedRun
from harness.tracking.publisher.publisher import MAX_POINTS_PER_DELIVERY
from harness.tracking.publisher.retries import LINGER_S, LONGEST_PAUSE_S
from tests.unit.tracking.publisher.fakes import (
    SETTINGS,
    FakeClock,
    FaultyStore,
    Killed,
    Refusal,
    end,
    journal_bytes,
    publisher,
)


def test_entries_are_delivered_in_order_when_the_store_works(run_dir: Path, outbox: JournalWriter) -> None:
    (run_dir / "checkpoints" / "epoch-0001").mkdir(parents=True)
    outbox.append("tags", {"a": "b"}, 1)
    outbox.append("params", {"lr": "0.1"}, 2)
    outbox.append("metrics", {"step": 1, "values": {"x": 0.5, "y": 2.0}}, 3)
    outbox.append("dataset", {"name": "digits"}, 4)
    outbox.append("text", {"name": "t.txt", "content": "words"}, 5)
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "k1"}, 6)
    end(outbox)
    store = FaultyStore()

    assert publisher(run_dir, store).run()

    assert store.calls == [
        ("tags", {"a": "b"}),
        ("params", {"lr": "0.1"}),
        ("metrics", [("x", 0.5, 3, 1), ("y", 2.0, 3, 1)]),
        ("dataset", {"name": "digits"}),
        ("text", ("t.txt", "words")),
        ("checkpoint", ("epoch-0001", run_dir / "checkpoints" / "epoch-0001", Registration("registered"))),
        ("tags", {"harness.end_reason": "done"}),
        ("end", ("FINISHED", 99)),
    ]
    delivered = read_delivered(run_dir / "outbox")
    assert delivered.offset == journal_bytes(run_dir)
    assert delivered.models == {"epoch-0001": "m-epoch-0001"}
    assert delivered.refused == ()


def test_new_entries_are_delivered_when_they_are_appended_later(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "1"}, 1)
    script: list[Callable[[], Any]] = [lambda: outbox.append("tags", {"b": "2"}, 2), lambda: end(outbox)]
    clock = FakeClock(lambda: script.pop(0)())
    store = FaultyStore()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["tags", "tags", "tags", "end"]
    assert script == []


def test_metrics_are_grouped_when_they_are_consecutive(run_dir: Path, outbox: JournalWriter) -> None:
    for step in range(1050):
        outbox.append("metrics", {"step": step, "values": {"x": 1.0, "y": 2.0}}, step)
    outbox.append("tags", {"a": "b"}, 5)
    outbox.append("metrics", {"step": 2000, "values": {"x": 1.0}}, 6)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    sizes = [len(value) for name, value in store.calls if name == "metrics"]
    assert sizes == [1000, 1000, 100, 1]
    assert max(sizes) <= MAX_POINTS_PER_DELIVERY
    assert store.kinds == ["metrics", "metrics", "metrics", "tags", "metrics", "tags", "end"]
    assert [point[3] for name, value in store.calls[:3] for point in value] == [s for s in range(1050) for _ in "xy"]


def test_entry_is_not_divided_when_it_exceeds_the_limit(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("metrics", {"step": 1, "values": {"small": 1.0}}, 1)
    outbox.append("metrics", {"step": 2, "values": {f"m{i}": 1.0 for i in range(1200)}}, 2)
    outbox.append("metrics", {"step": 3, "values": {"small": 1.0}}, 3)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert [len(value) for name, value in store.calls if name == "metrics"] == [1, 1200, 1]


class WatchfulStore(FaultyStore):
    """Notes, at each batch of points, which record of what is delivered is on disk.

    Args:
        outbox_dir: the outbox.
    """

    def __init__(self, outbox_dir: Path) -> None:
        super().__init__()
        self.records: set[int] = set()
        self._record = outbox_dir / DELIVERED

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        super().log_metrics(points)
        if self._record.exists():
            # Each time it is replaced it is another file.
            self.records.add(self._record.stat().st_mtime_ns)


def append_batches(outbox: JournalWriter, num_batches: int) -> None:
    for step in range(num_batches * MAX_POINTS_PER_DELIVERY):
        outbox.append("metrics", {"step": step, "values": {"loss": 1.0}}, step)


def test_record_is_written_once_a_second_when_there_is_a_backlog(run_dir: Path, outbox: JournalWriter) -> None:
    append_batches(outbox, 100)
    end(outbox)
    store = WatchfulStore(run_dir / "outbox")
    begun_s = time.monotonic()
    assert publisher(run_dir, store).run()
    took_s = time.monotonic() - begun_s
    assert store.kinds.count("metrics") == 100
    assert len(store.records) <= 1 + took_s
    assert read_delivered(run_dir / "outbox").offset == journal_bytes(run_dir)


def test_record_is_on_disk_when_the_publisher_waits_for_more(run_dir: Path, outbox: JournalWriter) -> None:
    append_batches(outbox, 4)
    seen: list[int] = []

    def look() -> None:
        seen.append(read_delivered(run_dir / "outbox").offset - journal_bytes(run_dir))
        if len(seen) == 1:
            end(outbox)

    assert publisher(run_dir, FaultyStore(), FakeClock(look)).run()
    assert seen == [0]


def test_record_is_on_disk_when_the_publisher_gives_up(run_dir: Path, outbox: JournalWriter) -> None:
    append_batches(outbox, 4)
    store = FaultyStore(None, None, None, *[ConnectionError("unreachable")] * 100)
    assert not publisher(run_dir, store, exited=lambda: True).run()
    ends = [entry.end_offset for entry in read_entries(run_dir / "outbox")]
    assert read_delivered(run_dir / "outbox").offset == ends[3 * MAX_POINTS_PER_DELIVERY - 1]


def test_entry_is_retried_when_the_store_is_unreachable(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    outbox.append("params", {"c": "d"}, 2)
    end(outbox)
    unreachable = [ConnectionError(f"unreachable {number}") for number in range(12)]
    store, clock = FaultyStore(*unreachable), FakeClock()

    assert publisher(run_dir, store, clock).run()

    assert store.kinds == ["tags", "params", "tags", "end"]
    assert store.num_tries == 12 + 4
    assert len(clock.pauses_s) == 12
    assert all(later > 0.5 * earlier for earlier, later in itertools.pairwise(clock.pauses_s))
    assert clock.pauses_s[0] <= 0.5
    assert 0.5 * LONGEST_PAUSE_S <= clock.pauses_s[-1] <= LONGEST_PAUSE_S
    assert read_delivered(run_dir / "outbox").refused == ()


def test_entry_is_dropped_and_recorded_when_it_is_refused(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("params", {"lr": "0.1"}, 1)
    outbox.append("metrics", {"step": 1, "values": {"x": 1.0}}, 2)
    end(outbox)
    store = FaultyStore(Refusal("changing param values is not allowed"))
    clock = FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["metrics", "tags", "end"]
    assert clock.pauses_s == []
    delivered = read_delivered(run_dir / "outbox")
    assert delivered.refused == ("params: changing param values is not allowed (lr)",)
    assert delivered.offset == journal_bytes(run_dir)


class PickyStore(FaultyStore):
    """Refuses each request that has one of these names in it."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = set(names)

    def _check(self, names: Iterable[str]) -> None:
        self.num_tries += 1
        if found := self._names & set(names):
            raise Refusal(f"Invalid value {min(found)}. Names may only contain letters")

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        self._check(key for key, *_ in points)
        self.calls.append(("metrics", list(points)))

    def log_params(self, values: Mapping[str, str]) -> None:
        self._check(values)
        self.calls.append(("params", dict(values)))


def test_few_requests_suffice_when_some_points_are_refused(run_dir: Path, outbox: JournalWriter) -> None:
    for step in range(100):
        bad = {"bad": 1.0} if step in (0, 57) else {}
        outbox.append("metrics", {"step": step, "values": {**bad, "loss": 0.5, "acc": 0.25}}, step)
    end(outbox)
    store = PickyStore("bad")
    assert publisher(run_dir, store).run()
    points = [point for kind, points in store.calls if kind == "metrics" for point in points]
    good = (("acc", 0.25), ("loss", 0.5))
    assert sorted(points) == sorted((key, value, step, step) for step in range(100) for key, value in good)
    assert store.num_tries < 40
    delivered = read_delivered(run_dir / "outbox")
    reason = "metrics: Invalid value bad. Names may only contain letters (bad)"
    assert (delivered.refused, delivered.num_refused) == ((reason, reason), 2)
    assert delivered.offset == journal_bytes(run_dir)


def test_other_parameters_are_logged_when_one_is_refused(run_dir: Path, outbox: JournalWriter) -> None:
    values = {f"p{number}": str(number) for number in range(43)}
    outbox.append("params", values, 1)
    end(outbox)
    store = PickyStore("p7")
    assert publisher(run_dir, store).run()
    arrived = {name: text for kind, params in store.calls if kind == "params" for name, text in params.items()}
    assert arrived == {name: text for name, text in values.items() if name != "p7"}
    # Without the rest of the store's message, which shows the values.
    assert read_delivered(run_dir / "outbox").refused == ("params: Invalid value p7 (p7)",)


def test_password_is_redacted_when_the_error_has_it(
    run_dir: Path, outbox: JournalWriter, capsys: pytest.CaptureFixture[str]
) -> None:
    outbox.append("params", {"lr": "0.1"}, 1)
    end(outbox)
    store = FaultyStore(ConnectionError("GET http://me:hunter2@host"), Refusal("PUT http://me:hunter2@host"))
    assert publisher(run_dir, store).run()
    assert read_delivered(run_dir / "outbox").refused == ("params: PUT http://me:***@host (lr)",)
    logged = capsys.readouterr().err
    assert "cannot deliver yet: params" in logged
    assert "refused for good: params" in logged
    assert "hunter2" not in logged


def test_only_the_last_group_is_repeated_when_killed(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    outbox.append("metrics", {"step": 1, "values": {"x": 1.0}}, 2)
    outbox.append("metrics", {"step": 2, "values": {"x": 2.0}}, 3)
    outbox.append("params", {"c": "d"}, 4)
    end(outbox)
    first = FaultyStore(None, ("stored", Killed()))
    with pytest.raises(Killed):
        publisher(run_dir, first).run()
    second = FaultyStore()
    assert publisher(run_dir, second).run()
    group = ("metrics", [("x", 1.0, 2, 1), ("x", 2.0, 3, 2)])
    assert first.calls == [("tags", {"a": "b"}), group]
    assert second.calls[0] == group
    assert second.kinds == ["metrics", "params", "tags", "end"]


def test_delivered_entries_are_not_repeated_when_resumed(run_dir: Path, outbox: JournalWriter) -> None:
    end(outbox)
    assert publisher(run_dir, FaultyStore()).run()
    assert read_delivered(run_dir / "outbox").ended
    outbox.append("tags", {"resumed": "yes"}, 1)
    end(outbox, "KILLED")
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert store.calls == [
        ("tags", {"resumed": "yes"}),
        ("tags", {"harness.end_reason": "done"}),
        ("end", ("KILLED", 99)),
    ]


def test_run_is_failed_when_the_trainer_exits_without_an_end(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    store = FaultyStore()
    assert publisher(run_dir, store, exited=lambda: True).run()
    assert store.kinds == ["tags", "tags", "end"]
    assert store.calls[-1][1][0] == "FAILED"
    assert "without saying how" in store.calls[-2][1]["harness.end_reason"]
    assert read_delivered(run_dir / "outbox").offset == journal_bytes(run_dir)


def test_end_is_the_trainers_when_it_is_written_at_exit(run_dir: Path, outbox: JournalWriter) -> None:
    def exited() -> bool:
        # The last thing a trainer does: its end, and only then its standard input closes.
        if journal_bytes(run_dir) == 0:
            end(outbox)
        return True

    store = FaultyStore()
    assert publisher(run_dir, store, exited=exited).run()
    assert store.calls[-1] == ("end", ("FINISHED", 99))


def test_incomplete_line_is_ignored_when_the_trainer_is_killed(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    whole = journal_bytes(run_dir)
    with outbox.path.open("ab") as stream:
        stream.write(b'1234abcd {"kind":"metr')
    store = FaultyStore()
    assert publisher(run_dir, store, exited=lambda: True).run()
    assert store.calls[0] == ("tags", {"a": "b"})
    assert store.calls[-1][1][0] == "FAILED"
    assert read_delivered(run_dir / "outbox").offset == whole


def test_gives_up_when_the_trainer_has_exited(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    end(outbox)
    store = FaultyStore(None, *[ConnectionError("unreachable")] * 1000)
    clock = FakeClock()
    assert not publisher(run_dir, store, clock, exited=lambda: True).run()
    assert store.kinds == ["tags"]
    assert LINGER_S < clock.time_s <= LINGER_S + LONGEST_PAUSE_S
    # Nothing is forgotten: a later `harness sync` delivers the rest.
    later = FaultyStore()
    assert publisher(run_dir, later, exited=lambda: True).run()
    assert later.kinds == ["tags", "end"]


def test_retries_continue_when_the_trainer_is_alive(run_dir: Path, outbox: JournalWriter) -> None:
    end(outbox)
    store = FaultyStore(*[ConnectionError("unreachable")] * 100)
    clock = FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert clock.time_s > 10 * LINGER_S
    assert store.kinds == ["tags", "end"]


def test_ids_are_on_disk_without_a_password_when_the_run_is_open(run_dir: Path, outbox: JournalWriter) -> None:
    store = FaultyStore(ConnectionError("not up yet"), ConnectionError("not up yet"))
    publisher(run_dir, store).open_run()
    assert store.calls == [("open_run", WantedRun("key-1", "run", "exp"))]
    record = json.loads((run_dir / "run.json").read_text())
    assert record == {
        "run_name": "run",
        "run_key": "key-1",
        "run_id": "run-1",
        "experiment_id": "exp-1",
        "experiment_name": "exp",
        "tracking_uri": "http://me:***@host:5000",
    }


def test_error_is_the_stores_when_it_does_not_respond_in_time(run_dir: Path, outbox: JournalWriter) -> None:
    clock = FakeClock()
    with pytest.raises(ConnectionError, match="unreachable"):
        publisher(run_dir, FaultyStore(*[ConnectionError("unreachable")] * 1000), clock).open_run()
    assert SETTINGS.start_timeout_s < clock.time_s < SETTINGS.start_timeout_s + 1
    assert "run_id" not in json.loads((run_dir / "run.json").read_text())


@pytest.mark.parametrize("exited", [True, False])
def test_error_is_immediate_when_permanent_or_trainer_has_exited(
    run_dir: Path, outbox: JournalWriter, exited: bool
) -> None:
    error = ConnectionError("unreachable") if exited else Refusal("the experiment is deleted")
    clock = FakeClock()
    with pytest.raises(type(error)):
        publisher(run_dir, FaultyStore(error), clock, exited=lambda: exited).open_run()
    assert clock.pauses_s == []


def test_run_is_opened_by_its_id_when_it_resumes(run_dir: Path, outbox: JournalWriter) -> None:
    (run_dir / "run.json").write_text(json.dumps({"run_name": "run", "run_key": "key-1", "run_id": "r9"}))
    store = FaultyStore()
    publisher(run_dir, store, attempt=2).open_run()
    assert store.calls == [("open_run", WantedRun("key-1", "run", "exp", "r9"))]


def test_journal_stays_small_when_the_store_keeps_up(run_dir: Path) -> None:
    outbox = JournalWriter(run_dir / "outbox", 4000)
    steps = iter(range(1, 301))
    sizes: list[int] = []

    def trains() -> None:
        sizes.append(sum(path.stat().st_size for path in (run_dir / "outbox").glob("journal*")))
        assert len(sizes) < 20_000, "the journal is not pruned"
        if sizes[-1] > 3000:
            time.sleep(0.001)  # lets the artifact worker run, which pruning waits for
            return
        written = [step for step in itertools.islice(steps, 10) if outbox.append("metrics", row(step), step)]
        if not written and not ended:
            ended.append(True)
            end(outbox)

    ended: list[bool] = []
    store = FaultyStore()
    assert publisher(run_dir, store, FakeClock(trains), max_outbox_bytes=4000).run()
    assert [step for name, points in store.calls if name == "metrics" for _, _, _, step in points] == [*range(1, 301)]
    assert outbox.num_dropped == 0
    assert max(sizes) < 4000
    assert outbox.end_offset > 4 * max(sizes)


def row(step: int) -> dict[str, Any]:
    return {"step": step, "values": {"loss": step / 8}}


def test_record_stays_small_when_many_entries_are_refused(run_dir: Path, outbox: JournalWriter) -> None:
    for step in range(1, 101):
        outbox.append("tags", {"name": str(step)}, step)
    end(outbox)
    store = FaultyStore(*[Refusal(f"no {step}") for step in range(1, 101)])
    assert publisher(run_dir, store).run()
    delivered = read_delivered(run_dir / "outbox")
    assert delivered.num_refused == 100
    assert delivered.refused == tuple(f"tags: no {step} (name)" for step in range(1, MAX_REFUSED_KEPT + 1))
