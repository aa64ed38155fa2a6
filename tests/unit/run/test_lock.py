from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.errors import RunDirError
from harness.io.lock_file import Kind, holder_of, open_lock
from harness.run.lock import FILE, RunLock

# Takes the lock, forks a child as a data loader does, says both ids, and waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from harness.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]), 0)
child = os.fork() if sys.argv[2] == "forks" else 0
if child or sys.argv[2] != "forks":
    print(os.getpid(), child, flush=True)
time.sleep(600)
"""

Hold = Callable[[str], tuple[int, int]]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that holds the lock of `tmp_path`; its id and its child's."""
    started: list[subprocess.Popen[str]] = []
    pids: list[int] = []

    def start(how: str) -> tuple[int, int]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), how], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        pid, child = (int(word) for word in process.stdout.readline().split())
        if child:
            pids.append(child)
        return pid, child

    yield start
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_error_says_who_holds_it_when_another_process_does(tmp_path: Path, hold: Hold) -> None:
    pid, _ = hold("alone")
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(
        RunDirError, match=rf"in use by process {pid} \(user \S+\) on \S+ since \d{{4}}-\S+Z; .*another run_name"
    ):
        RunLock(tmp_path, timeout_s=0.3)
    assert (tmp_path / FILE).read_bytes() == before
    assert json.loads(before)["pid"] == pid


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_lock_is_free_at_once_when_its_holder_is_killed(tmp_path: Path, hold: Hold, how: str) -> None:
    pid, child = hold(how)
    os.kill(pid, signal.SIGKILL)
    begun_s = time.monotonic()
    lock = RunLock(tmp_path, timeout_s=10)
    assert time.monotonic() - begun_s < 5
    if child:
        os.kill(child, 0)  # it lives on, with the descriptor, and keeps nobody out
    lock.release()


def test_lock_is_waited_for_when_its_holder_is_just_ending(tmp_path: Path, hold: Hold) -> None:
    pid, _ = hold("alone")
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {pid}"])
    lock = RunLock(tmp_path, timeout_s=10)
    assert killer.wait() == 0
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_other_processes_stay_out_when_this_process_tries_twice(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(RunDirError, match="in use by another PeriodicLogger of this process"):
        RunLock(tmp_path, timeout_s=0)
    # The refused try has not given up the first one's: a POSIX lock goes with any descriptor that is closed.
    code = f"from pathlib import Path; from harness.run.lock import RunLock; RunLock(Path({str(tmp_path)!r}), 0)"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"in use by process {os.getpid()}" in refused.stderr
    lock.release()
    lock.release()
    subprocess.run([sys.executable, "-c", code], check=True)


def test_lock_can_be_taken_when_a_full_disk_was_in_the_way_before(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            RunLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    lock = RunLock(tmp_path, timeout_s=0)
    assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    lock.release()


def test_holder_is_named_when_it_has_not_written_who_it_is(tmp_path: Path, hold: Hold) -> None:
    pid, _ = hold("alone")
    (tmp_path / FILE).write_bytes(b'{"pid":')
    with pytest.raises(RunDirError, match=rf"in use by process {pid} \(user \S+\) on"):
        RunLock(tmp_path, timeout_s=0)


# What a user who may only read the directory can do to it.
STRANGER = """
import fcntl, os, sys, time
os.setuid(12345)
file = os.open(sys.argv[1], os.O_RDONLY)
(fcntl.lockf if sys.argv[2] == "POSIX" else fcntl.flock)(file, fcntl.LOCK_SH)
print("held", flush=True)
time.sleep(600)
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A directory that every user can look into; pytest's own cannot be."""
    with tempfile.TemporaryDirectory(prefix="harness-lock-", dir="/tmp") as found:
        Path(found).chmod(0o755)
        yield Path(found)


@needs_root
def test_other_users_cannot_hold_the_lock_when_they_may_read_the_directory(public: Path) -> None:
    before = os.umask(0)
    try:
        RunLock(public).release()
    finally:
        os.umask(before)
    assert stat.S_IMODE((public / FILE).stat().st_mode) == 0o600
    command = [sys.executable, "-I", "-c", STRANGER, str(public / FILE), "POSIX"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "PermissionError" in refused.stderr


def test_lock_of_an_earlier_version_is_closed_to_others_when_it_is_taken(tmp_path: Path) -> None:
    (tmp_path / FILE).touch()
    (tmp_path / FILE).chmod(0o644)
    RunLock(tmp_path).release()
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600


@needs_root
@pytest.mark.parametrize("kind", ["POSIX", "FLOCK"])
def test_other_user_is_named_when_it_holds_a_lock_of_an_earlier_version(public: Path, kind: Kind) -> None:
    path = public / FILE
    RunLock(public).release()  # what this process has written there is not who holds it
    path.chmod(0o644)
    command = [sys.executable, "-I", "-c", STRANGER, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as stranger:
        assert stranger.stdout is not None and stranger.stdout.readline() == "held\n"
        expected = f"process {stranger.pid} (user 12345) on {socket.gethostname()}"
        file = open_lock(path)
        assert holder_of(file, kind) == expected
        os.close(file)
        if kind == "POSIX":
            with pytest.raises(RunDirError, match=re.escape(f"in use by {expected};")):
                RunLock(public, timeout_s=0)
        stranger.kill()
