"""Open lock files that other users cannot open, and describe the process that holds one; never imports torch.

A user who can open a file, even only for reading, can lock it forever. Lock files therefore have mode 0600. The kernel
lists the holders of a lock (``/proc/locks``; on a network file system only those of this host), and the file contains a
record of its last holder.
"""

from __future__ import annotations

import json
import os
import pwd
import socket
import time
from pathlib import Path
from typing import Literal

from harness.io.durable_files import open_private

_LOCKS = Path("/proc/locks")
# `fcntl.lockf` acquires a lock of the first kind, `fcntl.flock` one of the second.
Kind = Literal["POSIX", "FLOCK"]


def open_lock(path: Path) -> int:
    """Open or create a lock file with mode 0600 and return its descriptor.

    Raises:
        OSError: if it cannot be opened for writing.
    """
    return open_private(path, os.O_RDWR | os.O_CREAT)


def write_holder(descriptor: int) -> None:
    """Write this process into a lock file as its holder.

    Raises:
        OSError: if the file cannot be written.
    """
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "user": _user_name(os.geteuid()),
        "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    # In place, because a new file of this name would be another lock.
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)


def holder_of(descriptor: int, kind: Kind) -> str:
    """Describe the holder of a lock by process, user, host and, if it wrote a record, the start time."""
    pids = _pids(os.fstat(descriptor), kind)
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        host, pid, since = record["host"], record["pid"], record["since"]
    except (OSError, ValueError, KeyError, TypeError):
        # The holder has not written its record yet, or is another program.
        return _process(pids[0], socket.gethostname()) if pids else "another process"
    if pids and (host, pid) != (socket.gethostname(), pids[0]):
        return _process(pids[0], socket.gethostname())
    user = f" (user {record['user']})" if "user" in record else ""
    return f"process {pid}{user} on {host} since {since}"


def _process(pid: int, host: str) -> str:
    try:
        user = f" (user {_user_name(os.stat(f'/proc/{pid}').st_uid)})"
    except OSError:
        user = ""
    return f"process {pid}{user} on {host}"


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _pids(found: os.stat_result, kind: Kind) -> list[int]:
    """Return the processes of this host that hold a lock on a file.

    A line is ``1: POSIX ADVISORY WRITE 4711 08:01:1234 0 EOF``, with pid, device and inode; ``->`` marks a waiter.
    """
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines if "->" not in line]
    held = [(each[5], int(each[4])) for each in fields if len(each) >= 6 and each[1] == kind]
    exact = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    # An overlay file system reports another device here than in /proc/locks.
    pids = [pid for place, pid in held if place == exact] or [
        pid for place, pid in held if place.rpartition(":")[2] == str(found.st_ino)
    ]
    # Processes outside this container have no id here.
    return [pid for pid in pids if pid > 0]
