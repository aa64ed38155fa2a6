"""One private SLURM for all tests, and what a test wants to see of it when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    running = Cluster(2)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture
def cluster(session_cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The SLURM. Jobs that a test leaves are cancelled, and their logs printed: pytest shows them where it failed."""
    yield session_cluster
    session_cluster.put_right()
    for log in sorted(tmp_path.rglob("*.log")):
        print(f"----- {log.relative_to(tmp_path)}\n{log.read_text(errors='replace')[-6000:]}")
