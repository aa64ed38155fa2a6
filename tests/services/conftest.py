from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.mlflow_server import MlflowServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    running = MlflowServer(tmp_path_factory.mktemp("server") / "mlflow")
    running.start()
    yield running
    running.stop()
