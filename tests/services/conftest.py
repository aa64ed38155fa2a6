from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.mlflow_server import MlflowServer
from tests.services.postgres import Postgres
from tests.services.s3 import S3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("server") / "mlflow")
    running.start()
    yield running
    running.stop()


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
