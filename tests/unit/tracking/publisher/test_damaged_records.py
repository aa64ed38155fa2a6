"""Damaged records on disk: the run's next attempt starts, and MLflow has everything once. With a real store."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from harness.tracking.journal.delivery_state import DAMAGED_ENTRIES, DELIVERED, read_delivered
from harness.tracking.journal.entries import JOURNAL, journal_end
from harness.tracking.journal.logged_points import KnownPoints, read_logged
from harness.tracking.journal.pruning import PRUNED, Pruned, read_pruned, write_pruned
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import PublisherSettings
from harness.tracking.publisher.attempts import FILE as ATTEMPTS
from harness.tracking.publisher.launcher import write_settings
from harness.tracking.publisher.publisher import Publisher
from harness.tracking.publisher.sync import deliver_rest, is_incomplete
from tests.services.mlflow_server import make_database
from tests.unit.tracking.publisher.fakes import FakeTrainer

STEPS = 10


class Run:
    """A run directory and its MLflow store."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.outbox_dir = run_dir / "outbox"
        run_dir.mkdir()
        (run_dir / "run.json").write_text(json.dumps({"run_name": "it", "run_key": "key", "run_id": None}))
        self.uri = make_database(run_dir.parent / "mlflow.db")
        # The artifacts are beside the database.
        mlflow.MlflowClient(self.uri).create_experiment("exp", str(run_dir.parent / "artifacts"))

    def train(self, attempt: int) -> None:
        """Write an attempt's journal entries."""
        outbox = JournalWriter(self.outbox_dir)
        outbox.append("attempt", {"number": attempt, "facts": {"world_size": str(attempt)}})
        for step in range(STEPS * (attempt - 1), STEPS * attempt):
            outbox.append("metrics", {"step": step, "values": {"loss": step / 8}})
        outbox.append("end", {"status": "FINISHED", "reason": f"of {attempt}", "step": STEPS * attempt})
        outbox.close()

    def deliver(self, attempt: int) -> Publisher:
        settings = PublisherSettings("it", self.uri, "exp", None, start_timeout_s=30.0, attempt=attempt)
        publisher = Publisher(self.run_dir, settings, MlflowStore(self.uri), FakeTrainer(lambda: True))
        publisher.open_run()
        assert publisher.run()
        return publisher

    @property
    def steps(self) -> list[int]:
        """Steps of the points in MLflow."""
        history = mlflow.MlflowClient(self.uri).get_metric_history(self.run_id, "loss")
        return sorted(point.step for point in history)

    @property
    def run_id(self) -> str:
        return str(json.loads((self.run_dir / "run.json").read_text())["run_id"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "it")


def _with_offset(change: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(outbox_dir: Path) -> None:
        record = json.loads((outbox_dir / DELIVERED).read_text())
        record["offset"] = record["models_offset"] = change(record["offset"])
        (outbox_dir / DELIVERED).write_text(json.dumps(record))

    return damage


def _cut(outbox_dir: Path) -> None:
    content = (outbox_dir / DELIVERED).read_text()
    (outbox_dir / DELIVERED).write_text(content[: len(content) // 2])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "journal removed": lambda outbox_dir: (outbox_dir / JOURNAL).unlink(),
    "record empty": lambda outbox_dir: (outbox_dir / DELIVERED).write_text(""),
    "record cut": _cut,
    "record is something else": lambda outbox_dir: (outbox_dir / DELIVERED).write_text("[1]"),
    "offset beyond the journal": _with_offset(lambda offset: offset + 10_000_000),
    "offset within a line": _with_offset(lambda offset: offset - 20),
    "record gone": lambda outbox_dir: (outbox_dir / DELIVERED).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_points_are_stored_once_when_the_record_is_damaged(run: Run, damage: Callable[[Path], None]) -> None:
    run.train(1)
    run.deliver(1)
    damage(run.outbox_dir)
    run.train(2)
    assert is_incomplete(run.run_dir)
    publisher = run.deliver(2)
    assert run.steps == [*range(2 * STEPS)]
    assert not is_incomplete(run.run_dir)
    assert read_delivered(run.outbox_dir).offset == journal_end(run.outbox_dir)
    found = mlflow.MlflowClient(run.uri).get_run(run.run_id)
    assert (found.info.status, found.data.tags["harness.end_reason"]) == ("FINISHED", "of 2")
    records = json.loads((run.run_dir / ATTEMPTS).read_text())
    assert [(records[number]["reason"], records[number]["world_size"]) for number in "12"] == [
        ("of 1", "1"),
        ("of 2", "2"),
    ]
    is_removed = damage is DAMAGES["record gone"]
    assert [DELIVERED in note for note in publisher.notes] == ([] if is_removed else [True])


def test_new_journal_is_detected_when_it_is_as_long_as_the_old(run: Run) -> None:
    run.train(1)
    run.deliver(1)
    # As long to the byte, and only then looked at.
    (run.outbox_dir / JOURNAL).unlink()
    run.train(2)
    with (run.outbox_dir / DELIVERED).open() as stream:
        record = json.load(stream)
    record["offset"] = record["models_offset"] = journal_end(run.outbox_dir)
    (run.outbox_dir / DELIVERED).write_text(json.dumps(record))
    assert is_incomplete(run.run_dir)
    run.deliver(2)
    assert run.steps == [*range(2 * STEPS)]


@pytest.mark.parametrize("garbage", [b"\0" * 30, b"garbage\n" * 2], ids=["zeros", "lines"])
def test_later_entries_are_delivered_when_one_is_damaged(run: Run, garbage: bytes) -> None:
    run.train(1)
    lines = (run.outbox_dir / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[5] = garbage + lines[5][len(garbage) :]
    (run.outbox_dir / JOURNAL).write_bytes(b"".join(lines))
    publisher = run.deliver(1)
    assert run.steps == [step for step in range(STEPS) if step != 4]
    delivered = read_delivered(run.outbox_dir)
    assert delivered.num_damaged == len(lines[5].splitlines())
    assert (delivered.refused, delivered.num_refused) == ((), 0)
    assert (run.outbox_dir / DAMAGED_ENTRIES).read_bytes() == lines[5]
    assert stat.S_IMODE((run.outbox_dir / DAMAGED_ENTRIES).stat().st_mode) == 0o600
    assert publisher.notes == []
    # The next attempt starts.
    assert not read_logged(run.outbox_dir).params
    assert KnownPoints(run.outbox_dir, 0).latest["loss"].step == 0
    run.train(2)
    run.deliver(2)
    assert run.steps == [step for step in range(2 * STEPS) if step != 4]


def test_sync_succeeds_and_names_the_file_when_entry_is_damaged(run: Run) -> None:
    run.train(1)
    lines = (run.outbox_dir / JOURNAL).read_bytes().splitlines(keepends=True)
    lines[5] = b"garbage\n"
    (run.outbox_dir / JOURNAL).write_bytes(b"".join(lines))
    named = {"run_name": "it", "tracking_uri": run.uri, "experiment_name": "exp", "registered_model_name": None}
    write_settings(run.outbox_dir, {**named, "start_timeout_s": 30.0})
    for _ in range(2):
        damaged, rest = deliver_rest(run.run_dir, None).splitlines()
        assert damaged.startswith(f"{run.run_dir}: damaged entries of the journal, not in MLflow: 1;")
        assert damaged.endswith(str(run.outbox_dir / DAMAGED_ENTRIES))
        assert rest == f"all else is in MLflow run {run.run_id}"
    assert run.steps == [step for step in range(STEPS) if step != 4]


def test_record_is_read_when_it_has_no_count_of_damage(run: Run) -> None:
    run.train(1)
    run.deliver(1)
    record = json.loads((run.outbox_dir / DELIVERED).read_text())
    assert record.pop("num_damaged") == 0
    (run.outbox_dir / DELIVERED).write_text(json.dumps(record))
    assert read_delivered(run.outbox_dir).offset == journal_end(run.outbox_dir)


@pytest.mark.parametrize("content", ["", '{"1": {"sta', "[]", '{"one": 1}'])
def test_attempts_are_read_from_tags_when_their_file_is_damaged(run: Run, content: str) -> None:
    run.train(1)
    run.deliver(1)
    before = json.loads((run.run_dir / ATTEMPTS).read_text())
    (run.run_dir / ATTEMPTS).write_text(content)
    run.train(2)
    run.deliver(2)
    after = json.loads((run.run_dir / ATTEMPTS).read_text())
    assert after["1"] == before["1"]
    assert after["2"]["reason"] == "of 2"


@pytest.mark.parametrize("content", ["", '{"latest": {', '{"latest": {"loss": [1]}, "params": {}, "checkpoints": []}'])
def test_attempt_starts_with_a_note_when_the_summary_is_damaged(run: Run, content: str) -> None:
    run.train(1)
    write_pruned(run.outbox_dir, Pruned({"loss": (1.0, 1, 1)}, {"lr": "0.1"}, frozenset({"k"})))
    assert read_pruned(run.outbox_dir).params == {"lr": "0.1"}
    (run.outbox_dir / PRUNED).write_text(content)
    assert read_logged(run.outbox_dir).params == {}
    (note,) = run.deliver(1).notes
    assert f"{PRUNED}: is damaged" in note
