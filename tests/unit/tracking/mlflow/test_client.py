from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import mlflow.utils.rest_utils
import pytest
import requests
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException, RestException
from sqlalchemy import event

from harness.tracking.mlflow import client
from harness.tracking.mlflow.client import is_permanent
from harness.tracking.mlflow.store import MlflowStore
from harness.tracking.mlflow.store_protocol import WantedRun
from tests.services.mlflow_server import make_database

DATASET = {
    "name": "digits",
    "digest": "0123",
    "source_type": "code",
    "source": "here",
    "profile": "{}",
    "context": "training",
}


def opened(uri: str, client: Any = None) -> MlflowStore:
    store = MlflowStore(uri, client)
    store.open_run(WantedRun("key", "run", "exp"))
    return store


def engine_of(client: mlflow.MlflowClient) -> Any:
    return client._tracking_client.store.engine


def as_answered(error: MlflowException) -> RestException:
    """The error as a client of a server has it: by the server's JSON."""
    return RestException({"error_code": error.error_code, "message": error.message})


def test_error_is_transient_when_the_database_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make_database(tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOLCLASS", "QueuePool")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "1")
    client = mlflow.MlflowClient(uri)
    store = opened(uri, client)
    engine = engine_of(client)
    # Of 10 more, and of 30 s: MLflow has no variables that take these values.
    engine.pool._max_overflow, engine.pool._timeout = 0, 0.1
    with engine.connect(), pytest.raises(MlflowException, match="QueuePool limit") as caught:
        client.log_batch(store.run_id, metrics=[Metric("loss", 1.0, 1, 1)])
    assert caught.value.error_code == "BAD_REQUEST"
    assert not is_permanent(caught.value)
    assert not is_permanent(as_answered(caught.value))
    engine.dispose()


def test_one_dataset_is_stored_when_two_requests_insert_it(tmp_path: Path) -> None:
    uri = make_database(tmp_path / "mlflow.db")
    client = mlflow.MlflowClient(uri)
    first, second = opened(uri, client), opened(uri, mlflow.MlflowClient(uri))
    conflicts: list[str] = []

    @event.listens_for(engine_of(client), "before_cursor_execute")
    def insert_first(connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        if statement.startswith("INSERT INTO datasets") and not conflicts:
            conflicts.append(statement)
            second.log_dataset(DATASET)  # between the look and the insertion of the first

    try:
        first.log_dataset(DATASET)
    finally:
        event.remove(engine_of(client), "before_cursor_execute", insert_first)
    assert conflicts
    inputs = client.get_run(first.run_id).inputs.dataset_inputs
    assert [each.dataset.name for each in inputs] == ["digits"]


@pytest.mark.parametrize("kind", ["sql", "file"])
@pytest.mark.parametrize("deleted", ["run", "experiment"])
def test_error_is_transient_when_the_run_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: str, kind: str
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = make_database(tmp_path / "mlflow.db") if kind == "sql" else (tmp_path / "mlruns").as_uri()
    client = mlflow.MlflowClient(uri)
    store = opened(uri, client)
    run = client.get_run(store.run_id)
    actions: list[Callable[[], object]] = [
        lambda: store.log_metrics([("loss", 1.0, 1, 1)]),
        lambda: store.log_params({"lr": "0.1"}),
        lambda: store.set_tags({"team": "a"}),
        lambda: client.create_logged_model(run.info.experiment_id, "model", store.run_id),
    ]
    if deleted == "run":
        actions.append(lambda: store.set_terminated("FINISHED", 1))
        client.delete_run(store.run_id)
    else:
        client.delete_experiment(run.info.experiment_id)
    num_refused = 0
    for action in actions:
        try:
            action()
        except MlflowException as error:
            assert not is_permanent(error) and not is_permanent(as_answered(error)), error
            num_refused += 1
    assert num_refused >= (4 if deleted == "run" else 1)
    if deleted == "run":
        client.restore_run(store.run_id)
    else:
        client.restore_experiment(run.info.experiment_id)
    for action in actions:
        action()
    assert client.get_run(store.run_id).data.metrics == {"loss": 1.0}


SQL = "(psycopg2.errors.{}) {} (Background on this error at: https://sqlalche.me/e/20/{})"


@pytest.mark.parametrize(
    ("answer", "is_final"),
    [
        ({"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid metric name"}, True),
        ({"error_code": "BAD_REQUEST", "message": SQL.format("NumericValueOutOfRange", "bigint", "9h9h")}, True),
        ({"error_code": "BAD_REQUEST", "message": SQL.format("NotNullViolation", "null value", "gkpj")}, True),
        ({"error_code": "BAD_REQUEST", "message": SQL.format("ReadOnlySqlTransaction", "read-only", "2j85")}, False),
        ({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database is locked"}, False),
        ({"message": "no healthy upstream"}, False),
    ],
    ids=["value", "out-of-range", "null", "read-only", "locked", "of-a-proxy"],
)
def test_error_is_permanent_when_it_is_about_the_data(answer: dict[str, str], is_final: bool) -> None:
    assert is_permanent(RestException(answer)) == is_final


def test_error_is_transient_when_a_proxy_responds_400() -> None:
    # As MLflow's client makes it of an answer that is no JSON.
    with pytest.raises(MlflowException) as caught:
        mlflow.utils.rest_utils.verify_rest_response(_page(), "/api/2.0/mlflow/runs/log-batch")
    assert caught.value.error_code == "BAD_REQUEST"
    assert not is_permanent(caught.value)


def _page() -> Any:
    response = requests.Response()
    response.status_code = 400
    response._content = b"<html>Request blocked</html>"
    return response


VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture(autouse=True)
def environment_of_a_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def address() -> Iterator[str]:
    """Address of a server that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def error_of(address: str) -> Exception:
    store = MlflowStore(address)
    store.run_id = "a" * 32
    with pytest.raises(Exception) as caught:
        store.log_metrics([("loss", 1.0, 1, 1)])
    assert isinstance(caught.value, Exception)
    return caught.value


def test_timeout_is_extended_when_the_server_is_slow(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    store, error = MlflowStore(address), error_of(address)
    given = []
    for _ in range(9):
        store.handle_transient_error(error)
        given.append(int(os.environ[VARIABLE]))
    assert given == [2, 4, 8, 16, 32, 64, 120, 120, 120]


def test_timeout_is_unchanged_when_the_users_is_longer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    error = error_of(address)
    monkeypatch.setenv(VARIABLE, str(2 * client.LONGEST_TIMEOUT_S))
    MlflowStore(address).handle_transient_error(error)
    assert os.environ[VARIABLE] == str(2 * client.LONGEST_TIMEOUT_S)


def test_timeout_is_unchanged_when_the_server_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    MlflowStore(address).handle_transient_error(error_of(address))
    assert os.environ[VARIABLE] == "1"
