from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import LogBatch

from harness.tracking.mlflow.client import connect, has_run, is_permanent, rest_store_of
from harness.tracking.mlflow.names import clean_model_name
from harness.tracking.mlflow.registry import Registration, Registry
from harness.tracking.mlflow.store import MlflowStore, _log_batch_body
from harness.tracking.mlflow.store_protocol import WantedRun
from tests.services.mlflow_server import make_database

points = st.tuples(st.text(min_size=1), st.floats(), st.integers(0, 2**62), st.integers(0, 2**62))


@given(st.lists(points, max_size=5))
def test_request_equals_mlflows_own_when_points_are_sent(logged: list[tuple[str, float, int, int]]) -> None:
    ours = ParseDict(json.loads(_log_batch_body("run-1", logged)), LogBatch())
    theirs = LogBatch(run_id="run-1", metrics=[Metric(*point).to_proto() for point in logged])
    assert [math.isnan(m.value) for m in ours.metrics] == [math.isnan(m.value) for m in theirs.metrics]
    for metric in (*ours.metrics, *theirs.metrics):
        metric.value = 0.0 if math.isnan(metric.value) else metric.value
    assert ours == theirs


def test_no_rest_store_is_found_when_the_client_is_unknown() -> None:
    assert rest_store_of(MlflowClient("http://127.0.0.1:9")) is not None
    assert rest_store_of(object()) is None


@pytest.fixture
def store(tmp_path: Path) -> MlflowStore:
    """On a real database, with a run nested under one whose name has an apostrophe."""
    store = MlflowStore(make_database(tmp_path / "mlflow.db"))
    store.open_run(WantedRun("key-1", "run", "default", parent="bob's sweep"))
    return store


def test_one_parent_is_used_when_its_name_has_quotes(store: MlflowStore, tmp_path: Path) -> None:
    both = 'the "best" of bob\'s'
    for number, parent in enumerate(["bob's sweep", both, both], 2):
        store.open_run(WantedRun(f"key-{number}", "run", "default", parent=parent))
    runs = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs([store.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["bob's sweep", *["run"] * 4, both]


def test_parent_keeps_its_status_when_the_user_has_created_it(store: MlflowStore, tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    made = client.create_run(store.experiment_id).info.run_id
    child = client.create_run(store.experiment_id, tags={"mlflow.parentRunId": made}).info.run_id
    ours = client.get_run(store.run_id).data.tags["mlflow.parentRunId"]
    store.set_terminated("FAILED", 5)
    store.open_run(WantedRun("key-2", "run", "default", given_run_id=child))
    store.set_terminated("FAILED", 6)
    statuses = {run_id: client.get_run(run_id).info.status for run_id in (made, child, ours)}
    assert statuses == {made: "RUNNING", child: "FAILED", ours: "FAILED"}


def test_values_are_cleaned_when_the_journal_is_an_earlier_one(store: MlflowStore, tmp_path: Path) -> None:
    store.log_metrics([("val/AR@100", 1.0, 1, 1), ("a/../b", 2**63 + 1, 1, 1), ("good", 1.0, 1, -1)])
    store.log_params({"acc@1": "1", "acc%1": "2", "..": "3"})
    store.set_tags({"": "1", "broken": "\udcff\0"})
    store.log_text("../../outside.txt", "text\udcff")
    dataset = dict.fromkeys(("digest", "source_type", "source", "profile", "context"), "x")
    store.log_dataset({**dataset, "name": "\udcff" * 999})
    numbers: list[tuple[Any, int]] = [(1.0, 2**63), (1.0, -(2**63) - 1), (10**400, 1), (None, 1)]
    for value, step in numbers:
        with pytest.raises(MlflowException, match="is not a 64-bit number") as caught:
            store.log_metrics([("x", value, 1, step)])
        assert is_permanent(caught.value)
    run = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").get_run(store.run_id)
    assert run.data.metrics == {"val/AR_100-0f5bccb8": 1.0, "a/__/b-3d6c7d88": float(2**63), "good": 1.0}
    assert run.data.params.keys() >= {"acc_1-1458ac90", "__-482c6323"} and len(run.data.params) == 3
    assert run.data.tags["broken"] == "??"


@pytest.mark.parametrize("name", ["bob's model", "a/b", 'the "best"', 'bob\'s "best"', "..", "m" * 300, ""], ids=ascii)
def test_one_version_is_created_when_the_registered_name_is_odd(store: MlflowStore, name: str) -> None:
    client: Any = store._client
    registration = Registration(clean_model_name(name), aliases=True)
    for step in (1, 2):
        model = client.create_logged_model(store.experiment_id, source_run_id=store.run_id)
        record = {"key": str(step), "epoch": 1, "step": step}
        for _ in range(2):
            Registry(client).register(registration, model.model_id, store.run_id, record)
    assert client.get_registered_model(registration.name).aliases == {"last": 2}


def test_temporary_directory_is_empty_when_a_database_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "what?").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    uri = f"sqlite:///{tmp_path}/what%3F/mlflow.db"
    run = connect(uri).create_run("0")
    assert (tmp_path / "what?" / "mlflow.db").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert has_run(uri, run.info.run_id)
