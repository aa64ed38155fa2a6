from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pytest

from harness.checkpoint.format.commit import Manifest, commit, temporary_of
from harness.tracking.journal.delivery_state import DeliveryState, read_delivered
from harness.tracking.journal.entries import read_entries
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.registry import Registration
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import PublisherSettings
from harness.tracking.publisher import artifact_worker
from harness.tracking.publisher.artifact_worker import ArtifactWorker
from harness.tracking.publisher.progress import Heartbeat
from harness.tracking.publisher.publisher import Publisher
from harness.tracking.publisher.retries import Clock, RetryPolicy
from harness.tracking.publisher.sync import is_incomplete, undelivered_line
from tests.services.mlflow_server import make_database
from tests.unit.tracking.publisher.fakes import SETTINGS, FakeClock, FakeTrainer, FaultyStore, Refusal, end, publisher


def test_checkpoint_is_refused_when_its_directory_is_gone(run_dir: Path, outbox: JournalWriter) -> None:
    outbox.append("checkpoint", {"name": "epoch-0001", "key": "k1"}, 1)
    end(outbox)
    store = FaultyStore()
    assert publisher(run_dir, store).run()
    assert store.kinds == ["tags", "end"]
    (refused,) = read_delivered(run_dir / "outbox").refused
    assert "epoch-0001 is gone" in refused


def test_checkpoint_is_refused_when_it_was_replaced(run_dir: Path, outbox: JournalWriter) -> None:
    # A resume has set the damaged checkpoint aside, and the run has saved at its step again.
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


def saved(run_dir: Path, outbox: JournalWriter, number: int) -> Path:
    directory = run_dir / "checkpoints" / f"epoch-{number:04d}"
    directory.mkdir(parents=True)
    outbox.append("checkpoint", {"name": directory.name, "key": f"k{number}"}, number)
    return directory


def retire(outbox: JournalWriter, number: int) -> None:
    outbox.append("retire", {"name": f"epoch-{number:04d}", "key": f"k{number}"}, 10 + number)


@pytest.mark.parametrize("is_there", [True, False])
def test_checkpoint_is_skipped_when_it_is_pruned_before_upload(
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
    # The retirement is delivered: an earlier try may have left an incomplete model.
    assert store.kinds == ["checkpoint", "retire", "tags", "end"]
    assert store.calls[0][1][0] == "epoch-0002"
    assert store.calls[1] == ("retire", ("k1", Registration("registered")))
    delivered = read_delivered(run_dir / "outbox")
    assert (delivered.refused, delivered.models) == ((), {"epoch-0002": "m-epoch-0002"})
    assert clock.pauses_s == []


def test_model_is_deleted_after_its_successor_when_it_is_pruned(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_upload_is_abandoned_when_the_checkpoint_is_pruned(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_model_is_kept_when_it_is_in_use(run_dir: Path, outbox: JournalWriter) -> None:
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


def test_retirement_is_retried_when_the_store_is_unreachable(run_dir: Path, outbox: JournalWriter) -> None:
    retire(outbox, 1)
    end(outbox)
    store = FaultyStore(ConnectionError("unreachable"), ("stored", ConnectionError("response lost")))
    assert publisher(run_dir, store).run()
    assert store.kinds == ["retire", "retire", "tags", "end"]


@pytest.mark.parametrize(
    ("wish", "files", "drops"), [("last", ["o"], True), ("last", [], False), ("all", ["o"], False)]
)
def test_older_resume_files_are_deleted_when_a_newer_has_its_own(
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


NUM_BATCHES = 20
NUM_ROWS_PER_BATCH = 500


def num_bytes_read() -> int:
    """Return the number of bytes that this process has read, by the kernel's count."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["rchar"])


def test_backlog_is_read_once_when_it_is_delivered_in_batches(tmp_path: Path) -> None:
    outbox = JournalWriter(tmp_path / "outbox")
    for step in range(NUM_BATCHES * NUM_ROWS_PER_BATCH):
        outbox.append("metrics", {"step": step, "values": {"train/loss": step / 7}})
    outbox.append("text", {"name": "last.txt", "content": "words"})
    ends = [entry.end_offset for entry in read_entries(tmp_path / "outbox")]
    state = DeliveryState(tmp_path / "outbox")
    store = FaultyStore()
    retries = RetryPolicy(store, FakeTrainer(), Heartbeat(tmp_path / "outbox"), Clock())
    worker = ArtifactWorker(tmp_path, SETTINGS, store, state, retries)

    before = num_bytes_read()
    worker.start()
    for offset in (*ends[NUM_ROWS_PER_BATCH - 1 :: NUM_ROWS_PER_BATCH], ends[-1]):
        state.update(offset=offset)
        # Deliver the next batch after the worker has passed this one, as with a slow server.
        assert state.wait_for(lambda delivered, offset=offset: delivered.models_offset >= offset, timeout_s=60)
    num_read = num_bytes_read() - before

    worker.close()
    assert store.calls == [("text", ("last.txt", "words"))]
    assert num_read < 2 * outbox.end_offset, f"{num_read} bytes for a journal of {outbox.end_offset}"


def delivering(run_dir: Path, uri: str, store: type[MlflowStore] = MlflowStore) -> Publisher:
    settings = PublisherSettings("it", uri, "exp", None, start_timeout_s=30.0, attempt=1)
    publisher = Publisher(run_dir, settings, store(uri), FakeTrainer())
    publisher.open_run()
    return publisher


def trained(run_dir: Path, database: Path, artifacts: Path) -> mlflow.MlflowClient:
    """Create the directory of a finished training, and the store of its run."""
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"run_name": "it", "run_key": "key", "run_id": None}))
    client = mlflow.MlflowClient(make_database(database))
    client.create_experiment("exp", str(artifacts))
    outbox = JournalWriter(run_dir / "outbox")
    outbox.append("attempt", {"number": 1, "facts": {}})
    outbox.append("text", {"name": "summary.txt", "content": "a text"})
    outbox.append("metrics", {"step": 1, "values": {"loss": 0.5}})
    outbox.append("end", {"status": "FINISHED", "reason": "complete", "step": 1})
    outbox.close()
    return client


def test_files_are_delivered_later_when_artifacts_are_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_worker, "_MAX_OUTAGE_S", 1.0)
    run_dir = tmp_path / "it"
    # A file in the place of the artifact directory, so that no user can write there.
    (tmp_path / "blocked").touch()
    client = trained(run_dir, tmp_path / "mlflow.db", tmp_path / "blocked/artifacts")

    publisher = delivering(run_dir, client.tracking_uri)
    start_s = time.monotonic()
    assert not publisher.run() and publisher.has_ended
    assert time.monotonic() - start_s < 15
    run = client.get_run(publisher.store.run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 0.5})
    delivered = read_delivered(run_dir / "outbox")
    assert "blocked/artifacts" in undelivered_line(run_dir, delivered)
    assert is_incomplete(run_dir)

    # `harness sync` delivers again, first without success.
    assert not delivering(run_dir, client.tracking_uri).run()
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    (tmp_path / "blocked").unlink()
    assert delivering(run_dir, client.tracking_uri).run()
    again = client.get_run(run.info.run_id)
    assert (again.info.status, again.info.end_time) == ("FINISHED", run.info.end_time)
    assert "summary.txt" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert not is_incomplete(run_dir) and read_delivered(run_dir / "outbox").files_trouble == ""


class FailingThenSlow(MlflowStore):
    """A store whose first upload fails and whose second takes longer than the maximum outage."""

    num_tries = 0

    def log_text(self, name: str, content: str) -> None:
        if name == "summary.txt":  # not `attempts.json`, which the publisher uploads
            self.num_tries += 1
            if self.num_tries == 1:
                raise OSError("is unreachable")
            time.sleep(6)
        super().log_text(name, content)


def test_end_waits_for_an_upload_when_an_earlier_try_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_worker, "_MAX_OUTAGE_S", 1.0)
    client = trained(tmp_path / "it", tmp_path / "mlflow.db", tmp_path / "artifacts")
    publisher = delivering(tmp_path / "it", client.tracking_uri, FailingThenSlow)
    assert publisher.run()
    assert "summary.txt" in [file.path for file in client.list_artifacts(publisher.store.run_id)]
    assert read_delivered(tmp_path / "it/outbox").files_trouble == ""
