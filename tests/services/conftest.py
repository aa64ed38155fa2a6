from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.mlflow_server import MlflowServer
from tests.services.postgres import Postgres
from tests.services.s3 import BUCKET, S3


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests: each has experiments of its own, and starts it again where it has stopped it."""
    running = MlflowServer(tmp_path_factory.mktemp("server") / "mlflow")
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def server_is_up(request: pytest.FixtureRequest) -> None:
    """Also where the test before has failed while it was down."""
    if "server" in request.fixturenames:
        running: MlflowServer = request.getfixturevalue("server")
        if not running.is_running:
            running.start()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    running = Postgres()
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    running = S3(tmp_path_factory.mktemp("s3") / "s3")
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def s3_server(s3: S3, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """On PostgreSQL; it hands artifacts on to S3, and lets its clients do so by parts."""
    running = MlflowServer(
        tmp_path_factory.mktemp("s3-server") / "mlflow",
        store=postgres.database("through"),
        artifacts=("--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/through"),
        extra={**s3.environment, "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true"},
    )
    try:
        running.start()
        yield running
    finally:
        running.stop()
