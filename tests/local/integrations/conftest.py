from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from tests.services.mlflow_server import make_database


@pytest.fixture(autouse=True)
def in_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each training is in a directory of its own, with a store of its own, in a process that knows of no other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", make_database(tmp_path / "mlflow.db"))
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
