from __future__ import annotations

from pathlib import Path

import pytest

from tests.services.mlflow_server import make_database


@pytest.fixture
def empty_database(tmp_path: Path) -> None:
    """MLflow's tables, which take seconds to make, where a run in the test's directory makes them otherwise."""
    make_database(tmp_path / "mlflow.db")
