"""The SLURM that the tests start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.launching import ROOT, environment
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.services

LEFT_ALONE = """
import sys
from tests.slurm.cluster import Cluster
cluster = Cluster(1)
cluster.start()
print(cluster.directory, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_of_a_slurm_when_its_tests_were_killed(cluster: Cluster) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", LEFT_ALONE],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert killed.stdout is not None and killed.stdin is not None
    directory = Path(killed.stdout.readline().strip())
    node = json.loads((directory / "nodes.json").read_text())[0]
    daemons = [psutil.Process(int((directory / "run" / name).read_text())) for name in ("slurmctld.pid",)]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdin.close()
    killed.stdout.close()
    assert daemons[0].is_running() and node in Path("/etc/hosts").read_text()
    another = Cluster(1)
    try:
        another.start()
        assert not daemons[0].is_running() or daemons[0].status() == psutil.STATUS_ZOMBIE
        assert node not in Path("/etc/hosts").read_text() and not directory.exists()
        # Those that are in use stay.
        assert cluster.nodes[0] in Path("/etc/hosts").read_text() and len(cluster.nodes_that_are("idle")) == 2
    finally:
        another.stop()
