"""What tests of autologging have in common."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.autologging.loops import On, switching


@pytest.fixture
def on(tmp_path: Path) -> Iterator[On]:
    """Puts autologging on, in a run of that name below the test's directory; it is off again afterwards."""
    yield from switching(tmp_path, "run")
