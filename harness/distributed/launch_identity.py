"""Identify the launch that this process belongs to, so that a restart finds the run of the first start.

Importing this never imports torch, because the publisher and the command line use it too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.distributed import slurm_env


@dataclass(frozen=True)
class Rendezvous:
    """A rendezvous, named uniquely for this start of the ranks; a restart follows an earlier one of the same launch."""

    name: str
    is_restart: bool


_latest: Rendezvous | None = None


def record_rendezvous(rendezvous: Rendezvous) -> None:
    """Record the rendezvous of this process's ranks."""
    global _latest
    _latest = rendezvous


def latest_rendezvous() -> Rendezvous | None:
    """Return the latest rendezvous of this process's ranks; None if torch handled it."""
    return _latest


def is_launcher_rank_zero() -> bool:
    """Whether the launcher started this process as rank 0; true without a launcher."""
    return os.environ.get("RANK", "0") == "0"


def launch_identity(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return launcher -> an identity that all restarts of one launch share, and no other concurrent launch.

    Torch's elastic agent keeps address, port and run id over its restarts (seen with torch 2.13, static and c10d
    rendezvous). An earlier launch may have had the same ones, such as ``127.0.0.1:29500:none``; on a single node the
    agent's process distinguishes them.
    """
    found = {}
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        parts = [environment.get(name, "") for name in names]
        if environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE"):
            parts.append(_agent_process())
        found["torchelastic"] = ":".join(parts)
    if (job := slurm_env.read_job(environment)) is not None:
        found["slurm"] = job.identity
    return found


def restarted_identity(environment: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return launcher and identity if this process is a launcher's restart, else None."""
    identity = launch_identity(environment)
    # TORCHELASTIC_RESTART_COUNT stays 0 on a node on which no rank has failed.
    if "torchelastic" in identity and (latest := latest_rendezvous()) is not None and latest.is_restart:
        return "torchelastic", identity["torchelastic"]
    count = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if "torchelastic" in identity and count.isdigit() and int(count) > 0:
        return "torchelastic", identity["torchelastic"]
    job = slurm_env.read_job(environment)
    return ("slurm", job.identity) if job is not None and job.restart_count else None


def _agent_process() -> str:
    """Return host, id and start time of the nearest ancestor that the agent did not start; empty except on Linux."""
    pid = os.getppid()
    try:
        while pid > 1:
            directory = Path(f"/proc/{pid}")
            # The second field is the name, which may contain spaces and brackets.
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
            if b"TORCHELASTIC_RESTART_COUNT=" not in (directory / "environ").read_bytes():
                return f"{socket.gethostname()}:{pid}:{fields[19]}"
            pid = int(fields[1])
    except OSError:
        pass
    return ""
