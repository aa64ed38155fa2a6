"""The count of a run whose server was slow."""

from __future__ import annotations

import json
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from harness.tracking.mlflow.registry import CHECKPOINT_TAG
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import WantedRun
from tests.services.counting import count, problems, table
from tests.services.mlflow_server import make_database
from tests.services.tracking_load import write_checkpoint


def test_run_is_whole_when_a_model_that_was_made_twice_was_linked(tmp_path: Path) -> None:
    """A late server has created a second model and its link; the publisher then deletes one of the models."""
    uri = make_database(tmp_path / "mlflow.db")
    run_dir = tmp_path / "run"
    name, manifest = write_checkpoint(run_dir, 7, 1000, {})
    store, client = MlflowStore(uri), MlflowClient(uri)
    store.open_run(WantedRun("key", "run", "exp"))
    files = ["model.safetensors", "trainer_state.json", "manifest.json"]
    record = {"name": name, "key": manifest.key, "epoch": 0, "step": 7, "files": files, "metrics": []}
    store.log_checkpoint(record, run_dir / "checkpoints" / name, None)
    twin = client.create_logged_model(
        store.experiment_id, name, store.run_id, tags={CHECKPOINT_TAG: manifest.key, "step": "7"}
    )
    client.log_outputs(store.run_id, [LoggedModelOutput(twin.model_id, 7)])
    store.set_terminated("FINISHED", 1)

    (tmp_path / "sent.jsonl").write_text(json.dumps({"kind": "checkpoint", "key": manifest.key}) + "\n")
    found = count(uri, "exp", tmp_path / "sent.jsonl", run_dir)
    assert not problems(found), table(found)
