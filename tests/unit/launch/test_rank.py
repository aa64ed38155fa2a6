"""`harness rank` in a real process, configured by SLURM's variables."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from harness.distributed.job_rendezvous import ports_of
from harness.distributed.job_secret import SECRET_VARIABLE
from harness.errors import LaunchError

ROOT = Path(__file__).parents[3]


def test_secret_file_is_removed_when_rank_zero_fails_to_start(tmp_path: Path) -> None:
    job = f"{os.getpid()}{int.from_bytes(os.urandom(3), 'big')}"
    environment = {
        **{name: value for name, value in os.environ.items() if name != SECRET_VARIABLE},
        "PYTHONPATH": str(ROOT),
        "SLURM_CLUSTER_NAME": "test",
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    options = ("--config", str(ROOT / "configs" / "digits.yaml"), "--run_dir", str(tmp_path), "--run_name", "it")
    command = [sys.executable, "-m", "launch.cli", "rank", "--strategy", "ddp", *options, "--tracking.enabled", "false"]
    with ExitStack() as taken:
        for port in ports_of(f"test:{job}.0.0"):
            with suppress(OSError):  # in use already
                server = taken.enter_context(socket.socket())
                server.bind(("0.0.0.0", port))
                server.listen()
        ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert ended.returncode == LaunchError.exit_code, ended.stderr
    assert "ports is free on" in ended.stderr
    # The directory shows that the file was written.
    assert list((tmp_path / "slurm").iterdir()) == []
