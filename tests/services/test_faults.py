"""Faults between a run and a real MLflow server, after which nothing is lost or stored twice.

Each test ends with a count of what the tracker has taken against what MLflow has (`counting`).
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.tracking.journal.entries import read_entries
from harness.tracking.publisher.sync import deliver_rest
from tests.launching import started
from tests.services.counting import Count, count, problems, table
from tests.services.faulty_proxy import Fault, FaultyProxy
from tests.services.mlflow_server import MlflowServer
from tests.services.tracking_load import EXIT_UNDELIVERED

# Long enough for several tries and their pauses. `mlflow_async` has the same for a minute.
OUTAGE_S = 5.0
LIMIT_S = 240


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    found = FaultyProxy("127.0.0.1", server.port)
    yield found
    found.close()


@dataclass
class Load:
    """A run whose tracking uses the proxy, and its result."""

    server: MlflowServer
    proxy: FaultyProxy
    directory: Path
    process: subprocess.Popen[str] | None = None

    @property
    def experiment(self) -> str:
        # The server is shared with other files' tests, which may have the same word for an experiment.
        return f"faults-{self.directory.name}"

    @property
    def runs_dir(self) -> Path:
        return self.directory / "runs"

    @property
    def run_dir(self) -> Path:
        return self.runs_dir / "it"

    @property
    def sent(self) -> Path:
        return self.directory / "sent.jsonl"

    def words(self, *more: str) -> list[str | Path]:
        module = [sys.executable, "-m", "tests.services.tracking_load", self.runs_dir, "--sent", self.sent]
        return [*module, "--uri", self.proxy.uri, "--experiment", self.experiment, *more]

    @contextmanager
    def running(self, *more: str, until_step: int = 20, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """While it runs, from a step on; waits for its end, which must be a good one."""
        with started(self.words(*more), self.directory, environment) as process:
            if until_step:
                self.wait_for_step(until_step, process)
            yield process
            code = process.wait(LIMIT_S)
            assert code in (0, EXIT_UNDELIVERED), (self.directory / "output.txt").read_text()
        if code == EXIT_UNDELIVERED:
            deliver_rest(self.run_dir, None)

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        deadline_s = time.monotonic() + 90
        while not (self.sent.exists() and f'"step": {step},' in self.sent.read_text()):
            assert process.poll() is None and time.monotonic() < deadline_s, (self.directory / "output.txt").read_text()
            time.sleep(0.05)

    def count(self) -> dict[str, Count]:
        return count(self.server.uri, self.experiment, self.sent, self.run_dir)

    def assert_whole(self) -> None:
        found = self.count()
        print(table(found))
        assert not problems(found), table(found)

    @property
    def log(self) -> str:
        return (self.run_dir / "outbox/publisher.log").read_text()

    @property
    def longest_call_ms(self) -> float:
        return float(json.loads((self.directory / "output.txt").read_text().splitlines()[-1])["longest_call_ms"])


@pytest.fixture
def load(tmp_path: Path, server: MlflowServer, proxy: FaultyProxy) -> Load:
    return Load(server, proxy, tmp_path)


services = pytest.mark.services


@services
def test_model_is_complete_when_the_server_is_killed_in_upload(load: Load) -> None:
    with load.running("--steps", "100", "--checkpoint_every", "50", "--checkpoint_bytes", "80000000"):
        cut = Fault("cut", cut_after_bytes=10_000_000, method="PUT", path="mlflow-artifacts", times=1)
        load.proxy.misbehave(cut)
        load.proxy.wait_until("cut", 1, 60)
        load.server.stop(signal.SIGKILL)
        load.server.start()
        load.proxy.behave()
    load.assert_whole()


_PAGE = b"<!doctype html><title>Sign in</title>"
_HTML = {"Content-Type": "text/html"}
# The response of an MLflow server whose database connections are all in use.
_BUSY = json.dumps(
    {
        "error_code": "BAD_REQUEST",
        "message": "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00 "
        "(Background on this error at: https://sqlalche.me/e/20/3o7r)",
    }
).encode()

# Each is a run's; of its faults each request has one, or none.
ANSWERS = {
    "refuses": (
        Fault("500", status=500, share=0.3),
        Fault("429", status=429, share=0.4, headers={"Retry-After": "1"}),
    ),
    "does-it-and-is-not-heard": (
        Fault("504", status=504, is_forwarded=True, share=0.3),
        # The connection ends without an answer, once the server has done it.
        Fault("closed", is_forwarded=True, share=0.3),
        # Not done yet when the client has long tried again.
        Fault("504 late", status=504, is_late=True, share=0.3),
    ),
    "refuses-a-credential": (Fault("401", status=401, times=2), Fault("403", status=403)),
    "is-not-mlflow": (
        Fault("200 empty", status=200, content=b"", share=0.2),
        Fault("200 page", status=200, content=_PAGE, headers=_HTML, share=0.2),
        Fault("400 page", status=400, content=_PAGE, headers=_HTML, share=0.2),
    ),
    "is-busy": (Fault("QueuePool", status=400, content=_BUSY, share=0.5),),
    "hangs": (Fault("hangs", hangs=True, is_forwarded=True),),
}
AWAY, COMES_LATE = "goes-away", "comes-late"


@services
def test_everything_is_stored_once_when_the_server_is_faulty(tmp_path: Path, server: MlflowServer) -> None:
    """One run for each fault, all at the same time, because they mostly wait."""
    with ExitStack() as stack:
        loads: dict[str, Load] = {}
        for number, name in enumerate((*ANSWERS, AWAY, COMES_LATE)):
            proxy = FaultyProxy("127.0.0.1", server.port, seed=number)
            stack.callback(proxy.close)
            (tmp_path / name).mkdir()
            loads[name] = Load(server, proxy, tmp_path / name)
        loads[COMES_LATE].proxy.refuse()
        limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
        running = {
            name: stack.enter_context(
                load.running("--steps", "300", "--checkpoint_every", "110", until_step=0, **limits)
                if name == "hangs"
                else load.running("--steps", "300", "--checkpoint_every", "110", until_step=0)
            )
            for name, load in loads.items()
        }
        for name, load in loads.items():
            if name != COMES_LATE:
                load.wait_for_step(20, running[name])
            if name in ANSWERS:
                load.proxy.misbehave(*ANSWERS[name])
        loads[AWAY].proxy.refuse()
        time.sleep(OUTAGE_S)
        for load in loads.values():
            load.proxy.wait_until_each_has_hit(LIMIT_S / 4)
            load.proxy.behave()
            load.proxy.accept()
    for name, load in loads.items():
        print(name, dict(load.proxy.num_hit))
        load.assert_whole()
        assert load.proxy.num_hit.keys() == {fault.name for fault in ANSWERS.get(name, ())}
    assert "401" in loads["refuses-a-credential"].log
    assert loads["hangs"].proxy.num_hit["hangs"] >= 2
    assert "cannot deliver yet" in loads[AWAY].log
    assert "cannot open the run yet" in loads[COMES_LATE].log


@services
def test_nothing_is_lost_when_the_database_is_locked(load: Load) -> None:
    with load.running("--steps", "150"):
        store = sqlite3.connect(load.server.directory / "mlflow.db", isolation_level=None)
        store.execute("BEGIN EXCLUSIVE")
        time.sleep(OUTAGE_S)
        store.execute("ROLLBACK")
        store.close()
    load.assert_whole()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    directory = tmp_path / "runs"
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", directory], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def resize(directory: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", directory], check=True)


def test_nothing_is_lost_when_the_disk_is_full_and_has_room_again(small_disk: Path, load: Load) -> None:
    """The trainer's own: the journal, and the publisher's records."""
    steps = ("--steps", "400", "--checkpoint_every", "1000", "--text_every", "1000")
    with load.running(*steps):
        filler = small_disk / "filler"
        with filler.open("wb") as stream:
            fill(stream.fileno())
        time.sleep(OUTAGE_S / 2)
        taken = os.stat(load.run_dir / "outbox/journal.jsonl").st_size
        time.sleep(OUTAGE_S / 4)
        assert os.stat(load.run_dir / "outbox/journal.jsonl").st_size == taken  # it is full indeed
        filler.unlink()
    load.assert_whole()
    assert len(list(read_entries(load.run_dir / "outbox", kinds=("metrics",)))) == 400
    assert load.longest_call_ms < 1000


def fill(file: int) -> None:
    """Write until the disk is full."""
    for size in (65536, 1):
        try:
            while True:
                os.write(file, bytes(size))
        except OSError:
            continue


@pytest.fixture
def cramped_server(small_disk: Path) -> Iterator[MlflowServer]:
    """A server whose store is on the small disk, which has room enough for its database and little more."""
    resize(small_disk, "20m")
    found = MlflowServer(small_disk / "mlflow")
    found.start()
    yield found
    found.stop()


def test_nothing_is_lost_when_the_servers_disk_is_full(cramped_server: MlflowServer, small_disk: Path) -> None:
    proxy = FaultyProxy("127.0.0.1", cramped_server.port)
    directory = small_disk.parent / "load"
    directory.mkdir()
    load = Load(cramped_server, proxy, directory)
    with load.running("--steps", "150", "--checkpoint_every", "60", "--checkpoint_bytes", "1000000"):
        filler = small_disk / "filler"
        with filler.open("wb") as stream:
            fill(stream.fileno())
        time.sleep(OUTAGE_S)
        filler.unlink()
    proxy.close()
    load.assert_whole()
