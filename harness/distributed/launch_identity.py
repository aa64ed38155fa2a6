"""Which launch this process belongs to, so that a launcher's restart finds the run that it had made."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from harness.distributed import slurm_env
from harness.distributed.meeting import latest_meeting


def launch_identity(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Launcher -> what is the same for all restarts of one launch, and for no other launch at that time.

    Torch's elastic agent (below `accelerate launch` and `torchrun`) keeps address, port and run id over its
    restarts (torch 2.13, static and c10d rendezvous, seen). They may well be those of an earlier launch too,
    ``127.0.0.1:29500:none``; on one node the agent's process tells them apart.
    """
    found = {}
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        parts = [environment.get(name, "") for name in names]
        if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
            parts.append(_agent())
        found["torchelastic"] = ":".join(parts)
    if (job := slurm_env.read_job(environment)) is not None:
        found["slurm"] = job.identity
    return found


def restarted_identity(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Launcher and identity, where this process is a launcher's restart; else None."""
    identity = launch_identity(environment)
    # A node on which no rank has failed counts no restart.
    if "torchelastic" in identity and (meeting := latest_meeting()) is not None and meeting.is_restart:
        return "torchelastic", identity["torchelastic"]
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "torchelastic" in identity and count.isdigit() and int(count) > 0:
        return "torchelastic", identity["torchelastic"]
    job = slurm_env.read_job(environment)
    return ("slurm", job.identity) if job is not None and job.restart_count else None


def _agent() -> str:
    """The nearest process above that the agent did not start: host, id and time of start. Linux only, else empty."""
    pid = os.getppid()
    try:
        while pid > 1:
            directory = Path(f"/proc/{pid}")
            # The name in its second field may hold spaces and brackets.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if b"TORCHELASTIC_RESTART_COUNT=" not in (directory / "environ").read_bytes():
                return f"{socket.gethostname()}:{pid}:{fields[19]}"
            pid = int(fields[1])
    except OSError:
        pass
    return ""
