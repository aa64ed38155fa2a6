"""A server that takes longer than a request may: it is given longer, as long as it is slow and not away."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from harness.tracking.mlflow import client
from harness.tracking.mlflow.store import MlflowStore

VARIABLE = "MLFLOW_HTTP_REQUEST_TIMEOUT"


@pytest.fixture(autouse=True)
def environment_of_a_publisher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def address() -> Iterator[str]:
    """Of a server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def error_of(address: str) -> Exception:
    store = MlflowStore(address)
    store.run_id = "a" * 32
    with pytest.raises(Exception) as caught:
        store.log_metrics([("loss", 1.0, 1, 1)])
    assert isinstance(caught.value, Exception)
    return caught.value


def test_slow_server_is_given_longer_up_to_a_limit(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    store, error = MlflowStore(address), error_of(address)
    given = []
    for _ in range(9):
        store.handle_transient_error(error)
        given.append(int(os.environ[VARIABLE]))
    assert given == [2, 4, 8, 16, 32, 64, 120, 120, 120]


def test_limit_of_the_user_stays_when_it_is_longer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    error = error_of(address)
    monkeypatch.setenv(VARIABLE, str(2 * client.LONGEST_TIMEOUT_S))
    MlflowStore(address).handle_transient_error(error)
    assert os.environ[VARIABLE] == str(2 * client.LONGEST_TIMEOUT_S)


def test_server_that_is_away_is_not_waited_for_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    MlflowStore(address).handle_transient_error(error_of(address))
    assert os.environ[VARIABLE] == "1"
