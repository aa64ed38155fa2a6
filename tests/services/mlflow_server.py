"""A real `mlflow server` on a free port of this machine, on sqlite and local files by default."""

from __future__ import annotations

import functools
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.launching import BIN, descendants, environment

_START_LIMIT_S = 90


def make_database(path: Path) -> str:
    """Create an empty MLflow database on sqlite and return its address. It is a copy: creating tables is slow."""
    path.write_bytes(_empty_database())
    return f"sqlite:///{path}"


@functools.cache
def _empty_database() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix="harness-empty-") as directory:
        path = Path(directory, "mlflow.db")
        MlflowClient(f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


class MlflowServer:
    """Started, stopped and started again at one address, over one store.

    Args:
        directory: for its log, and its store where none is given; is made.
        store: the address of its database. It may have a password, and goes by the environment.
        artifacts: the options that say where its artifacts are.
        options: further ones.
        extra: environment variables of its own.
    """

    def __init__(
        self,
        directory: Path,
        *,
        store: str | None = None,
        artifacts: Sequence[str | Path] | None = None,
        options: Sequence[str | Path] = (),
        extra: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._options = artifacts or ("--serve-artifacts", "--artifacts-destination", directory / "files")
        self._options = [*self._options, *options]
        self._extra = dict(extra or {})
        directory.mkdir()
        self.store = store or make_database(directory / "mlflow.db")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = [BIN / "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": self.store}
        with (self.directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*words, *self._options],
                env=environment({**own, **self._extra}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline_s, self._log()
            time.sleep(0.1)  # a server says that it is up by answering, and in no other way

    @property
    def is_running(self) -> bool:
        """Whether it has been started, and neither stopped nor died."""
        return self._process is not None and self._process.poll() is None

    @property
    def pids(self) -> list[int]:
        """Its processes."""
        return [] if self._process is None else descendants(self._process.pid)

    def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self._process is None:
            return
        members = descendants(self._process.pid)
        for member in members:
            try:
                os.kill(member, number)
            except ProcessLookupError:
                continue
        self._process.wait(30)
        self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log(self) -> str:
        return (self.directory / "server.log").read_text()[-3000:]
