"""An artifact store that takes nothing: metrics and the end arrive, and files once it does. MLflow's own store."""

from __future__ import annotations

import json
import time
from pathlib import Path

import mlflow
import pytest

from harness.tracking.journal.delivery_state import read_delivered
from harness.tracking.journal.writer import JournalWriter
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import PublisherSettings
from harness.tracking.publisher import artifact_worker
from harness.tracking.publisher.publisher import Publisher
from harness.tracking.publisher.sync import is_incomplete, undelivered_line
from tests.services.mlflow_server import make_database
from tests.unit.tracking.test_publisher import FakeTrainer


def delivering(run_dir: Path, uri: str, store: type[MlflowStore] = MlflowStore) -> Publisher:
    settings = PublisherSettings("it", uri, "exp", None, start_timeout_s=30.0, attempt=1)
    publisher = Publisher(run_dir, settings, store(uri), FakeTrainer())
    publisher.open_run()
    return publisher


def trained(run_dir: Path, database: Path, artifacts: Path) -> mlflow.MlflowClient:
    """A run's directory with what its training has left, and the store that it goes to."""
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


def test_end_is_delivered_and_files_later_when_artifacts_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_worker, "_MAX_OUTAGE_S", 1.0)
    run_dir = tmp_path / "it"
    # A file where a directory is to be, which no user may write below.
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

    # And again, as `harness sync` does it: first in vain.
    assert not delivering(run_dir, client.tracking_uri).run()
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    (tmp_path / "blocked").unlink()
    assert delivering(run_dir, client.tracking_uri).run()
    again = client.get_run(run.info.run_id)
    assert (again.info.status, again.info.end_time) == ("FINISHED", run.info.end_time)
    assert "summary.txt" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert not is_incomplete(run_dir) and read_delivered(run_dir / "outbox").files_trouble == ""


class AwayThenSlow(MlflowStore):
    """The first try fails; the second takes longer than the end waits for a store that takes nothing."""

    num_tries = 0

    def log_text(self, name: str, content: str) -> None:
        if name == "summary.txt":  # and not what the other lane logs
            self.num_tries += 1
            if self.num_tries == 1:
                raise OSError("is away")
            time.sleep(6)
        super().log_text(name, content)


def test_end_waits_for_an_upload_when_a_try_before_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_worker, "_MAX_OUTAGE_S", 1.0)
    client = trained(tmp_path / "it", tmp_path / "mlflow.db", tmp_path / "artifacts")
    publisher = delivering(tmp_path / "it", client.tracking_uri, AwayThenSlow)
    assert publisher.run()
    assert "summary.txt" in [file.path for file in client.list_artifacts(publisher.store.run_id)]
    assert read_delivered(tmp_path / "it/outbox").files_trouble == ""
