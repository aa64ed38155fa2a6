"""An S3 server on a free port of this machine, in memory, behind a proxy that records the requests."""

from __future__ import annotations

import secrets
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.launching import BIN, environment
from tests.services.proxy import Proxy

_START_LIMIT_S = 60
BUCKET = "models"


class S3:
    """What a client needs of it is in `environment`."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._log = directory / "s3.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.proxy = Proxy(self._port)
        self.secret = f"s3-{secrets.token_hex(16)}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "MLFLOW_S3_ENDPOINT_URL": self.proxy.uri,
            "AWS_ACCESS_KEY_ID": "harness",
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        words = [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                words, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline_s = time.monotonic() + _START_LIMIT_S
        while not self._listens():
            assert self._process.poll() is None and time.monotonic() < deadline_s, self._log.read_text()[-3000:]
            time.sleep(0.05)  # it says that it is up by listening, and in no other way
        self.client().create_bucket(Bucket=BUCKET)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
        self.proxy.close()

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.proxy.uri,
            aws_access_key_id="harness",
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )

    def objects(self, prefix: str = "") -> dict[str, tuple[int, str]]:
        """Key -> size in bytes and ETag; one that was put in parts has their number in it."""
        found = self.client().list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {each["Key"]: (each["Size"], each["ETag"].strip('"')) for each in found}

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) == 0
