from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.tracking.journal.writer import JournalWriter


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text(json.dumps({"run_name": "run", "run_key": "key-1"}))
    return tmp_path


@pytest.fixture
def outbox(run_dir: Path) -> JournalWriter:
    return JournalWriter(run_dir / "outbox")
