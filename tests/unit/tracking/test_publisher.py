from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.checkpoint.format.commit import Manifest, commit, temporary_of
from harness.tracking.journal.delivery_state import DELIVERED, MAX_REFUSED_KEPT, read_delivered
from harness.tracking.journal.entries import JOURNAL, read_entries
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store_protocol import PublisherSettings, WantedRun
from harness.tracking.publisher.publisher import MAX_POINTS_PER_DELIVERY, Publisher
from harness.tracking.publisher.retries import LINGER_S, LONGEST_PAUSE_S, Clock


class Refusal(Exception):
    """The store says no for good."""


class Killed(BaseException):
    """The publisher is killed at this moment."""


class FaultyStore:
    """Records what it is told; fails as the script says, one line of it for each call.

    Args:
        failures: for each call in turn: None (it works), an error (nothing is stored), or a pair of
            "stored" and an error (it is stored, and the answer is lost).
    """

    def __init__(self, *failures: BaseException | tuple[str, BaseException] | None) -> None:
        self.run_id = ""
        self.experiment_id = ""
        self.experiment_name: str | None = None
        self.calls: list[tuple[str, Any]] = []
        self.num_tries = 0
        self.in_use: set[str] = set()
        self.model_specs: list[Mapping[str, Any] | None] = []
        self._failures = list(failures)

    def _call(self, name: str, value: Any) -> None:
        self.num_tries += 1
        failure = self._failures.pop(0) if self._failures else None
        if isinstance(failure, BaseException):
            raise failure
        self.calls.append((name, value))
        if failure is not None:
            raise failure[1]

    def open_run(self, wanted: WantedRun) -> None:
        self._call("open_run", wanted)
        self.run_id, self.experiment_id = "run-1", "exp-1"

    def tags(self) -> Mapping[str, str]:
        return {key: value for name, tags in self.calls if name == "tags" for key, value in tags.items()}

    def reopen(self) -> None:
        self._call("reopen", None)

    def log_metrics(self, points: Sequence[tuple[str, float, int, int]]) -> None:
        self._call("metrics", list(points))

    def log_params(self, values: Mapping[str, str]) -> None:
        self._call("params", dict(values))

    def set_tags(self, values: Mapping[str, str]) -> None:
        self._call("tags", dict(values))

    def log_dataset(self, record: Mapping[str, Any]) -> None:
        self._call("dataset", dict(record))

    def log_text(self, name: str, content: str) -> None:
        self._call("text", (name, content))

    def log_checkpoint(
        self,
        record: Mapping[str, Any],
        directory: Path,
        registration: Registration | None,
        model_spec: Mapping[str, Any] | None,
    ) -> str:
        self._call("checkpoint", (record["name"], directory, registration))
        self.model_specs.append(model_spec)
        return f"m-{record['name']}"

    def drop_resume_state(self, key: str) -> Sequence[str]:
        self._call("drop", key)
        return [f"all but {key} keep it"]

    def is_permanent(self, error: Exception) -> bool:
        return isinstance(error, Refusal)

    def handle_transient_error(self, error: Exception) -> None:
        """There is no timeout to extend."""

    def retire_checkpoint(self, key: str, registration: Registration | None) -> bool:
        self._call("retire", (key, registration))
        return key not in self.in_use

    def set_terminated(self, status: str | None, end_time_ms: int, *, is_user_run: bool = False) -> None:
        self._call("end", (status, end_time_ms))

    @property
    def kinds(self) -> list[str]:
        return [name for name, _ in self.calls]


class FakeClock(Clock):
    """A clock that advances only while the publisher sleeps.

    Args:
        wake: called after each pause.
    """

    def __init__(self, wake: Callable[[], None] = lambda: None) -> None:
        self.time_s = 0.0
        self.pauses_s: list[float] = []
        self._wake = wake

    def now_s(self) -> float:
        return self.time_s

    def sleep(self, pause_s: float) -> None:
        self.time_s += pause_s
        self.pauses_s.append(pause_s)
        assert len(self.pauses_s) < 1000, "the publisher waits for ever"
        time.sleep(0.001)  # lets the artifact worker run
        self._wake()


class FakeTrainer:
    """A trainer that is gone when the test says so."""

    def __init__(self, gone: Callable[[], bool] = lambda: False) -> None:
        self._gone = gone

    def is_gone(self) -> bool:
        return self._gone()


SETTINGS = PublisherSettings(
    "run", "http://me:hunter2@host:5000", "exp", Registration("registered"), start_timeout_s=10.0
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"run_name": "run", "run_key": "key-1"}))
    return tmp_path


@pytest.fixture
def outbox(run_dir: Path) -> JournalWriter:
    return JournalWriter(run_dir / "outbox")


def publisher(
    run_dir: Path,
    store: FaultyStore,
    clock: FakeClock | None = None,
    gone: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Publisher:
    replaced = dataclasses.replace(SETTINGS, **settings)
    return Publisher(run_dir, replaced, store, FakeTrainer(gone), clock=clock or FakeClock())


def end(outbox: JournalWriter, status: str = "FINISHED") -> None:
    outbox.append("end", {"status": status, "reason": "done"}, 99)


def journal_bytes(run_dir: Path) -> int:
    return (run_dir / "outbox" / JOURNAL).stat().st_size


# ------------------------------------------------------------------------- deliveries


def test_everything_arrives_in_order_when_the_store_works(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_later_entries_arrive_when_they_are_appended_while_it_waits(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "1"}, 1)
    script: list[Callable[[], Any]] = [lambda: outbox.append("tags", {"b": "2"}, 2), lambda: end(outbox)]
    clock = FakeClock(lambda: script.pop(0)())
    store = FaultyStore()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["tags", "tags", "tags", "end"]
    assert script == []


def test_metrics_go_together_up_to_the_limit_when_they_follow_each_other(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_entry_is_not_divided_when_it_alone_is_over_the_limit(run_dir: Path, outbox: JournalWriter) -> None:
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
    store = FaultyStore(None, None, None, *[ConnectionError("away")] * 100)
    assert not publisher(run_dir, store, gone=lambda: True).run()
    ends = [entry.end_offset for entry in read_entries(run_dir / "outbox")]
    assert read_delivered(run_dir / "outbox").offset == ends[3 * MAX_POINTS_PER_DELIVERY - 1]


# ------------------------------------------------------------------------- faults


def test_same_entry_is_tried_until_it_works_when_the_store_is_away(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    outbox.append("params", {"c": "d"}, 2)
    end(outbox)
    away = [ConnectionError(f"away {number}") for number in range(12)]
    store, clock = FaultyStore(*away), FakeClock()

    assert publisher(run_dir, store, clock).run()

    assert store.kinds == ["tags", "params", "tags", "end"]
    assert store.num_tries == 12 + 4
    assert len(clock.pauses_s) == 12
    assert all(later > 0.5 * earlier for earlier, later in itertools.pairwise(clock.pauses_s))
    assert clock.pauses_s[0] <= 0.5
    assert 0.5 * LONGEST_PAUSE_S <= clock.pauses_s[-1] <= LONGEST_PAUSE_S
    assert read_delivered(run_dir / "outbox").refused == ()


def test_entry_is_dropped_and_recorded_when_the_store_refuses_for_good(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_all_else_arrives_in_few_requests_when_a_few_points_are_refused(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_other_parameters_arrive_when_one_has_another_value_in_the_run(run_dir: Path, outbox: JournalWriter) -> None:
    values = {f"p{number}": str(number) for number in range(43)}
    outbox.append("params", values, 1)
    end(outbox)
    store = PickyStore("p7")
    assert publisher(run_dir, store).run()
    arrived = {name: text for kind, params in store.calls if kind == "params" for name, text in params.items()}
    assert arrived == {name: text for name, text in values.items() if name != "p7"}
    # Without the rest of the store's message, which shows the values.
    assert read_delivered(run_dir / "outbox").refused == ("params: Invalid value p7 (p7)",)


def test_password_is_left_out_when_the_refusal_has_it(
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


def test_checkpoint_is_refused_when_its_directory_is_gone(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "k1"}, 1)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert store.kinds == ["tags", "end"]
    (refused,) = read_delivered(run_dir / "outbox").refused
    assert "epoch-0001 is gone" in refused


def test_checkpoint_is_refused_when_another_has_its_name_by_now(run_dir: Path, outbox: JournalWriter) -> None:
    # A resume has set the damaged one aside, and the run has come to its step again.
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "damaged"}, 1)
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "good"}, 2)
    end(outbox)
    final = run_dir / "checkpoints" / "epoch-0001"
    temporary = temporary_of(final, "test")
    temporary.mkdir(parents=True)
    commit(temporary, final, Manifest("good", 1, 10, 1, {}, (), {}, {}))
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert store.kinds == ["checkpoint", "tags", "end"]
    delivered = read_delivered(run_dir / "outbox")
    assert delivered.models == {"epoch-0001": "m-epoch-0001"}
    (refused,) = delivered.refused
    assert "epoch-0001 is another one now" in refused


# ------------------------------------------------------------------------- pruned checkpoints


def saved(run_dir: Path, outbox: JournalWriter, number: int) -> Path:
    directory = run_dir / "checkpoints" / f"epoch-{number:04d}"
    directory.mkdir(parents=True)
    outbox.append("checkpoint", {"name": directory.name, "key": f"k{number}"}, number)
    return directory


def retire(outbox: JournalWriter, number: int) -> None:
    outbox.append("retire", {"name": f"epoch-{number:04d}", "key": f"k{number}"}, 10 + number)


@pytest.mark.parametrize("is_there", [True, False])
def test_pruned_one_is_skipped_quietly_when_it_was_not_published_yet(
    run_dir: Path, outbox: JournalWriter, is_there: bool
) -> None:
    first = saved(run_dir, outbox, 1)
    saved(run_dir, outbox, 2)
    retire(outbox, 1)
    end(outbox)
    if not is_there:
        first.rmdir()
    store, clock = FaultyStore(), FakeClock()
    assert publisher(run_dir, store, clock).run()
    # It is taken back all the same: an earlier try may have left a half of it.
    assert store.kinds == ["checkpoint", "retire", "tags", "end"]
    assert store.calls[0][1][0] == "epoch-0002"
    assert store.calls[1] == ("retire", ("k1", Registration("registered")))
    delivered = read_delivered(run_dir / "outbox")
    assert (delivered.refused, delivered.models) == ((), {"epoch-0002": "m-epoch-0002"})
    assert clock.pauses_s == []


def test_pruned_one_is_taken_back_after_its_successor_is_there_when_it_was_published(
    run_dir: Path, outbox: JournalWriter
) -> None:
    saved(run_dir, outbox, 1)
    steps: list[str] = []

    def once_published() -> None:
        if read_delivered(run_dir / "outbox").models and not steps:
            steps.append("second")
            saved(run_dir, outbox, 2)
            retire(outbox, 1)
            end(outbox)

    store = FaultyStore()
    assert publisher(run_dir, store, FakeClock(once_published)).run()
    assert store.kinds == ["checkpoint", "checkpoint", "retire", "tags", "end"]
    assert read_delivered(run_dir / "outbox").models == {"epoch-0002": "m-epoch-0002"}


def test_upload_is_given_up_once_when_the_checkpoint_is_pruned_in_the_middle_of_it(
    run_dir: Path, outbox: JournalWriter
) -> None:
    first = saved(run_dir, outbox, 1)

    class Pruned(FaultyStore):
        def log_checkpoint(
            self,
            record: Mapping[str, Any],
            directory: Path,
            registration: Registration | None,
            model_spec: Mapping[str, Any] | None,
        ) -> str:
            if record["name"] == "epoch-0001":
                saved(run_dir, outbox, 2)
                retire(outbox, 1)
                first.rmdir()
                end(outbox)
                raise Refusal("No such file or directory")  # of whatever kind the store makes of it
            return super().log_checkpoint(record, directory, registration, model_spec)

    store, clock = Pruned(), FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["checkpoint", "retire", "tags", "end"]
    assert read_delivered(run_dir / "outbox").refused == ()


def test_model_stays_known_when_somebody_uses_it(run_dir: Path, outbox: JournalWriter) -> None:
    saved(run_dir, outbox, 1)
    known = {"epoch-0001": "m-epoch-0001"}
    script: list[Callable[[], Any]] = [lambda: (retire(outbox, 1), end(outbox))]

    def retire_what_is_published() -> None:
        # One that is retired before is never published.
        if script and read_delivered(run_dir / "outbox").models == known:
            script.pop()()

    store = FaultyStore()
    store.in_use = {"k1"}
    assert publisher(run_dir, store, FakeClock(retire_what_is_published)).run()
    assert store.kinds == ["checkpoint", "retire", "tags", "end"]
    assert read_delivered(run_dir / "outbox").models == known


def test_retirement_is_tried_until_it_works_when_the_store_is_away(run_dir: Path, outbox: JournalWriter) -> None:
    retire(outbox, 1)
    end(outbox)
    store = FaultyStore(ConnectionError("away"), ("stored", ConnectionError("answer lost")))
    assert publisher(run_dir, store).run()
    assert store.kinds == ["retire", "retire", "tags", "end"]


def test_last_group_alone_is_repeated_when_killed_before_acknowledging(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_nothing_is_repeated_when_all_was_acknowledged(run_dir: Path, outbox: JournalWriter) -> None:
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


# ------------------------------------------------------------------------- the trainer is gone


def test_run_is_failed_when_the_trainer_is_gone_without_an_end(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    store = FaultyStore()
    assert publisher(run_dir, store, gone=lambda: True).run()
    assert store.kinds == ["tags", "tags", "end"]
    assert store.calls[-1][1][0] == "FAILED"
    assert "without saying how" in store.calls[-2][1]["harness.end_reason"]
    assert read_delivered(run_dir / "outbox").offset == journal_bytes(run_dir)


def test_end_is_the_trainers_own_when_it_was_written_just_before(run_dir: Path, outbox: JournalWriter) -> None:
    def gone() -> bool:
        # The last thing a trainer does: its end, and only then its standard input closes.
        if journal_bytes(run_dir) == 0:
            end(outbox)
        return True

    store = FaultyStore()
    assert publisher(run_dir, store, gone=gone).run()
    assert store.calls[-1] == ("end", ("FINISHED", 99))


def test_torn_line_is_left_out_when_the_trainer_was_killed_in_it(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    whole = journal_bytes(run_dir)
    with outbox.path.open("ab") as stream:
        stream.write(b'1234abcd {"kind":"metr')
    store = FaultyStore()
    assert publisher(run_dir, store, gone=lambda: True).run()
    assert store.calls[0] == ("tags", {"a": "b"})
    assert store.calls[-1][1][0] == "FAILED"
    assert read_delivered(run_dir / "outbox").offset == whole


def test_gives_up_after_a_while_when_trainer_and_store_are_gone(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("tags", {"a": "b"}, 1)
    end(outbox)
    store = FaultyStore(None, *[ConnectionError("away")] * 1000)
    clock = FakeClock()
    assert not publisher(run_dir, store, clock, gone=lambda: True).run()
    assert store.kinds == ["tags"]
    assert LINGER_S < clock.time_s <= LINGER_S + LONGEST_PAUSE_S
    # Nothing is forgotten: a later `harness sync` delivers the rest.
    later = FaultyStore()
    assert publisher(run_dir, later, gone=lambda: True).run()
    assert later.kinds == ["tags", "end"]


def test_does_not_give_up_when_the_trainer_lives(run_dir: Path, outbox: JournalWriter) -> None:
    end(outbox)
    store = FaultyStore(*[ConnectionError("away")] * 100)
    clock = FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert clock.time_s > 10 * LINGER_S
    assert store.kinds == ["tags", "end"]


# ------------------------------------------------------------------------- opening the run


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


def test_error_is_the_stores_when_it_does_not_answer_in_time(run_dir: Path, outbox: JournalWriter) -> None:
    clock = FakeClock()
    with pytest.raises(ConnectionError, match="away"):
        publisher(run_dir, FaultyStore(*[ConnectionError("away")] * 1000), clock).open_run()
    assert SETTINGS.start_timeout_s < clock.time_s < SETTINGS.start_timeout_s + 1
    assert "run_id" not in json.loads((run_dir / "run.json").read_text())


@pytest.mark.parametrize("gone", [True, False])
def test_error_comes_at_once_when_refused_or_nobody_waits(run_dir: Path, outbox: JournalWriter, gone: bool) -> None:
    error = ConnectionError("away") if gone else Refusal("the experiment is deleted")
    clock = FakeClock()
    with pytest.raises(type(error)):
        publisher(run_dir, FaultyStore(error), clock, gone=lambda: gone).open_run()
    assert clock.pauses_s == []


# ------------------------------------------------------------------------- attempts


def begin(outbox: JournalWriter, number: int, time_ms: int, **facts: str) -> None:
    outbox.append("attempt", {"number": number, "facts": facts}, time_ms)


def told(store: FaultyStore) -> dict[str, str]:
    """Every tag, the last value of each."""
    return {key: value for name, tags in store.calls if name == "tags" for key, value in tags.items()}


def test_span_is_told_when_an_attempt_begins_goes_on_and_ends(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000, world_size="2", strategy="ddp")
    outbox.append("metrics", {"step": 7, "values": {"x": 1.0}}, 2000)
    outbox.append("end", {"status": "KILLED", "reason": "stopped by SIGTERM", "step": 8}, 3500)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    prefix = "harness.attempt.1."
    assert {key.removeprefix(prefix): value for key, value in told(store).items() if key.startswith(prefix)} == {
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
    assert not [key for key in told(store) if key.startswith("harness.attempt.1.")]  # told before


def test_both_ends_are_told_when_the_first_attempts_was_not_delivered(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox, "FAILED")
    begin(outbox, 2, 5000)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store, attempt=2).run()
    assert [value[0] for name, value in store.calls if name == "end"] == ["FAILED", "FINISHED"]
    assert store.kinds.index("end") < store.kinds.index("reopen")


def test_killed_attempt_is_ended_by_the_next_when_its_publisher_died_too(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("metrics", {"step": 40, "values": {"x": 1.0}}, 4000)
    # Told to nobody: a publisher that was killed with its trainer. The next attempt's own finds it so.
    begin(outbox, 2, 9000)
    begin(outbox, 2, 9100, step_from="30")
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store, attempt=2).run()
    tags = told(store)
    assert tags["harness.attempt.1.status"] == "FAILED"
    assert tags["harness.attempt.1.ended"] == "1970-01-01T00:00:04.000Z"
    assert tags["harness.attempt.1.step_to"] == "40"
    assert "without saying how" in tags["harness.attempt.1.reason"]
    assert (tags["harness.attempt.2.step_from"], tags["harness.attempt.2.step_to"]) == ("30", "30")
    assert tags["harness.attempt.2.status"] == "FINISHED"


def test_killed_attempt_is_ended_by_its_publisher_when_that_lives(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("metrics", {"step": 40, "values": {"x": 1.0}}, 4000)
    store = FaultyStore()
    states = iter([False, True, True])
    assert publisher(run_dir, store, gone=lambda: next(states)).run()
    assert told(store)["harness.attempt.1.status"] == "FAILED"
    assert told(store)["harness.attempt.1.step_to"] == "40"
    assert told(store)["harness.attempt.1.ended"] > "2020"  # when it was seen, not when it last spoke


def test_older_publisher_lets_go_when_the_next_attempt_has_begun(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    outbox.append("tags", {"a": "b"}, 2000)
    begin(outbox, 2, 3000)
    outbox.append("tags", {"c": "d"}, 4000)
    old = FaultyStore()
    assert not publisher(run_dir, old, gone=lambda: True).run()
    assert "a" in told(old)
    assert not {"c", "harness.end_reason"} & told(old).keys()
    end(outbox)
    new = FaultyStore()
    assert publisher(run_dir, new, attempt=2).run()
    assert told(new)["c"] == "d"
    assert not {"a"} & told(new).keys()


def test_same_tags_are_told_again_when_killed_before_they_were_recorded(run_dir: Path, outbox: JournalWriter) -> None:
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
    assert told(second)["harness.attempt.2.started"] == "1970-01-01T00:00:05.000Z"


def test_run_ends_when_the_artifact_store_is_away(run_dir: Path, outbox: JournalWriter) -> None:
    begin(outbox, 1, 1000)
    end(outbox)
    store = FaultyStore(None, ConnectionError("no artifacts"), None, None, None, ConnectionError("no artifacts"))
    clock = FakeClock()
    assert publisher(run_dir, store, clock).run()
    assert store.kinds == ["tags", "tags", "end", "tags"]
    assert clock.pauses_s == []


def test_known_run_is_opened_by_its_id_when_it_goes_on(run_dir: Path, outbox: JournalWriter) -> None:
    (run_dir / "run.json").write_text(json.dumps({"run_name": "run", "run_key": "key-1", "run_id": "r9"}))
    store = FaultyStore()
    publisher(run_dir, store, attempt=2).open_run()
    assert store.calls == [("open_run", WantedRun("key-1", "run", "exp", "r9"))]


@pytest.mark.parametrize(
    ("wish", "files", "drops"), [("last", ["o"], True), ("last", [], False), ("all", ["o"], False)]
)
def test_state_of_earlier_ones_goes_when_the_newest_is_whole_and_has_its_own(
    run_dir: Path, outbox: JournalWriter, capsys: pytest.CaptureFixture[str], wish: str, files: list[str], drops: bool
) -> None:
    (run_dir / "checkpoints" / "epoch-0001").mkdir(parents=True)
    record = {"name": "epoch-0001", "key": "k1", "resume_files": files, "log_resume_state": wish, "files": files}
    outbox.append("checkpoint", record, 3)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert store.kinds == ["checkpoint", *(["drop"] if drops else []), "tags", "end"]
    assert ("all but k1 keep it" in capsys.readouterr().err) == drops


# ---------------------------------------------------------------------- how large it grows


def test_journal_stays_small_and_nothing_is_lost_while_the_store_keeps_up(run_dir: Path) -> None:
    outbox = JournalWriter(run_dir / "outbox", 4000)
    steps = iter(range(1, 301))
    sizes: list[int] = []

    def trains() -> None:
        sizes.append(sum(path.stat().st_size for path in (run_dir / "outbox").glob("journal*")))
        assert len(sizes) < 20_000, "the journal is not pruned"
        if sizes[-1] > 3000:
            time.sleep(0.001)  # the lane of models has a thread of its own, and keeps up once it gets to run
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


def test_record_of_what_is_refused_stays_small(run_dir: Path, outbox: JournalWriter) -> None:
    for step in range(1, 101):
        outbox.append("tags", {"name": str(step)}, step)
    end(outbox)
    store = FaultyStore(*[Refusal(f"no {step}") for step in range(1, 101)])
    assert publisher(run_dir, store).run()
    delivered = read_delivered(run_dir / "outbox")
    assert delivered.num_refused == 100
    assert delivered.refused == tuple(f"tags: no {step} (name)" for step in range(1, MAX_REFUSED_KEPT + 1))
