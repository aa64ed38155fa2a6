"""A private PostgreSQL cluster on a free port of this machine, with a password."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

_START_LIMIT_S = 60
# Debian's directory. It is not on the path, because there may be several versions.
_DEBIAN = Path("/usr/lib/postgresql")


class Postgres:
    """Started once, with as many databases as are asked for. Not on disk for good: it is not synced, and removed."""

    def __init__(self) -> None:
        self._programs = _programs()
        # It refuses to run as root.
        self._user = "postgres" if os.geteuid() == 0 else None
        # Not below pytest's directory, which only root may look into.
        self._directory = Path(tempfile.mkdtemp(prefix="harness-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.password = f"db-{secrets.token_hex(8)}"

    def start(self) -> None:
        if self._user is not None:
            shutil.chown(self._directory, self._user, self._user)
        password_file = self._directory / "password"
        password_file.write_text(self.password)
        password_file.chmod(0o644)
        data = self._directory / "data"
        making = [self._programs / "initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", "--no-sync"]
        making += ["--pwfile", password_file, "-E", "UTF8", "--locale", "C"]
        self._run(making).check_returncode()
        words = [self._programs / "postgres", "-D", data, "-p", str(self.port), "-c", "fsync=off"]
        words += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                words, cwd="/", user=self._user, group=self._user, extra_groups=self._groups, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._answers():
            assert self._process.poll() is None and time.monotonic() < deadline_s, self.log()
            time.sleep(0.05)  # it says that it is up by answering, and in no other way

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # which ends it without waiting for its clients
            self._process.wait(30)
        shutil.rmtree(self._directory)

    def database(self, name: str) -> str:
        """Create a database and return its SQLAlchemy address."""
        connection = self._connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f'CREATE DATABASE "{name}"')
        connection.close()
        return f"postgresql+psycopg2://mlflow:{self.password}@127.0.0.1:{self.port}/{name}"

    def dump(self, name: str) -> bytes:
        """All that is in a database, as text."""
        words = [self._programs / "pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", name]
        return subprocess.run(
            words, env={**os.environ, "PGPASSWORD": self.password}, capture_output=True, check=True, timeout=60
        ).stdout

    def log(self) -> str:
        return (self._directory / "log").read_text()[-3000:]

    @property
    def _groups(self) -> list[str] | None:
        return None if self._user is None else []

    def _run(self, words: list[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd="/",
            user=self._user,
            group=self._user,
            extra_groups=self._groups,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def _connect(self) -> Any:
        import psycopg2

        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user="mlflow", password=self.password, dbname="postgres"
        )

    def _answers(self) -> bool:
        import psycopg2

        try:
            self._connect().close()
        except psycopg2.OperationalError:
            return False
        return True


def _programs() -> Path:
    """The directory of the newest PostgreSQL's programs; skips the test where there is none."""
    found = sorted(_DEBIAN.glob("*/bin/initdb"), key=lambda path: float(path.parent.parent.name))
    if not found and (on_path := shutil.which("initdb")) is not None:
        found = [Path(on_path).resolve()]
    if not found:
        pytest.skip("there is no PostgreSQL: apt-get install postgresql")
    return found[-1].parent


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
