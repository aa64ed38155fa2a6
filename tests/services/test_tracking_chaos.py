"""Killed at random moments, in MLflow everything is there once. `tracking_chaos` by itself does it 100 times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.services.tracking_chaos import Chaos

pytestmark = pytest.mark.services


def test_everything_is_stored_once_when_processes_are_killed(tmp_path: Path) -> None:
    found = Chaos(tmp_path, num_kills=6, seed=3, num_steps=400).run()
    print(found["table"])
    assert sum(found["kills"].values()) == 6
    assert not found["problems"], found["table"]
