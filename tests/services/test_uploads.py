"""Uploads to real stores: complete, in parts if possible, within the rate limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from harness.tracking.mlflow.uploads import PART_BYTES, UploadError, UploadMeter, Uploads
from tests.services.mlflow_server import MlflowServer
from tests.services.proxy import Fault, Proxy
from tests.services.s3 import BUCKET, S3

pytestmark = pytest.mark.services

MB = 1024**2
# Three parts, the last one short.
LARGE_BYTES = 2 * PART_BYTES + 5 * MB


@pytest.fixture
def through(server: MlflowServer) -> Iterator[Proxy]:
    """A proxy to a server with local files, which has no multipart uploads."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def environment_of_a_publisher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    if "s3" in request.fixturenames:
        s3: S3 = request.getfixturevalue("s3")
        monkeypatch.setattr(s3.proxy, "fault", lambda method, path: None)
        s3.proxy.requests.clear()
        for key, value in s3.environment.items():
            monkeypatch.setenv(key, value)


def served(uri: str, name: str) -> Any:
    """Return the repository of a model's files behind a server."""
    return get_artifact_repository(f"mlflow-artifacts:/{name}", tracking_uri=uri)


def make(directory: Path, **sizes: int) -> dict[str, Path]:
    files = {name: directory / name for name in sizes}
    for name, size in sizes.items():
        files[name].write_bytes(os.urandom(size))
    return files


def assert_has(repository: Any, files: dict[str, Path], fetched: Path) -> None:
    fetched.mkdir()
    repository.download_artifacts("", str(fetched))
    assert {path.name for path in fetched.iterdir()} == files.keys()
    for name, path in files.items():
        assert (fetched / name).read_bytes() == path.read_bytes(), name


class Tally:
    """Counts the bytes that `Uploads` has sent.

    Args:
        threshold_bytes: number of bytes after which `is_reached` is set.
    """

    def __init__(self, threshold_bytes: float = float("inf")) -> None:
        self.num_bytes = 0
        self.is_reached = threading.Event()
        self._threshold_bytes = threshold_bytes
        self._lock = threading.Lock()

    def add_sent(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes += num_bytes
        if self.num_bytes > self._threshold_bytes:
            self.is_reached.set()


# ------------------------------------------------------------------------- by parts


def test_large_file_goes_by_parts_when_the_server_hands_on_to_s3(
    s3: S3, s3_server: MlflowServer, tmp_path: Path
) -> None:
    files, sent = make(tmp_path, large=LARGE_BYTES, small=3 * MB), Tally()
    repository = served(s3_server.uri, "parts")
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    found = s3.objects("through/parts/")
    assert found["through/parts/large"][1].endswith("-3")  # in our three parts
    assert "-" not in found["through/parts/small"][1]
    # The client has put them there itself, by addresses that the server signed.
    ours = [path for path in s3.proxy.paths("PUT", "through/parts/large") if "X-Amz-Signature" in path]
    assert len(ours) == 3
    assert all("partNumber=" in path for path in ours)
    assert sent.num_bytes == LARGE_BYTES + 3 * MB
    assert_has(repository, files, tmp_path / "fetched")


def test_large_file_goes_by_parts_when_it_goes_to_s3_directly(s3: S3, tmp_path: Path) -> None:
    files, sent = make(tmp_path, large=LARGE_BYTES, small=3 * MB), Tally()
    repository = get_artifact_repository(f"s3://{BUCKET}/direct")
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    found = s3.objects("direct/")
    assert (found["direct/large"][0], found["direct/large"][1][-2:]) == (LARGE_BYTES, "-3")
    assert "-" not in found["direct/small"][1]
    assert sent.num_bytes == LARGE_BYTES + 3 * MB
    assert_has(repository, files, tmp_path / "fetched")


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_part_is_sent_again_when_it_fails(s3: S3, s3_server: MlflowServer, tmp_path: Path, fault: Fault) -> None:
    files, sent = make(tmp_path, large=LARGE_BYTES), Tally()
    repository = served(s3_server.uri, f"again-{fault}")
    left = iter([fault])
    s3.proxy.fault = lambda method, path: next(left, None) if "partNumber=2" in path else None
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    tried = [request.status for request in s3.proxy.requests if "partNumber=2" in request.path]
    assert tried == [503 if fault == "503" else 0, 200]
    assert len(s3.proxy.paths("PUT", "partNumber=1&")) == 1
    assert s3.objects(f"through/again-{fault}/")[f"through/again-{fault}/large"][1].endswith("-3")
    assert sent.num_bytes == LARGE_BYTES
    assert_has(repository, files, tmp_path / "fetched")


def test_server_takes_the_file_whole_when_parts_are_refused(
    s3: S3, s3_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store behind the server may be closed to its clients."""
    monkeypatch.setattr("harness.tracking.mlflow.uploads._MAX_TRIES_PER_PART", 1)
    files, sent = make(tmp_path, large=LARGE_BYTES), Tally()
    repository = served(s3_server.uri, "closed")
    s3.proxy.fault = lambda method, path: "503" if "X-Amz-Signature" in path and method == "PUT" else None
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    assert s3.objects("through/closed/")["through/closed/large"][0] == LARGE_BYTES
    # No incomplete upload remains, and no byte is counted twice.
    assert s3.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", []) == []
    assert sent.num_bytes == LARGE_BYTES
    assert_has(repository, files, tmp_path / "fetched")


def test_file_goes_whole_when_the_server_has_no_parts(through: Proxy, tmp_path: Path) -> None:
    files, sent = make(tmp_path, large=LARGE_BYTES, other=LARGE_BYTES), Tally()
    repository = served(through.uri, "no-parts")
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    assert {request.status for request in through.requests if "/mpu/create" in request.path} == {501}
    whole = [request for request in through.requests if request.method == "PUT"]
    assert [request.body_bytes for request in whole] == [LARGE_BYTES, LARGE_BYTES]
    assert sent.num_bytes == 2 * LARGE_BYTES
    assert_has(repository, files, tmp_path / "fetched")


# ------------------------------------------------------------------------- whole, in the end


def test_incomplete_file_is_uploaded_again_when_server_was_killed(server: MlflowServer, tmp_path: Path) -> None:
    files = make(tmp_path, weights=24 * MB, torn=4 * MB, whole=2 * MB)
    stored = server.directory / "files" / "killed"
    stored.mkdir(parents=True)
    # As a disk that was full leaves one, and one of an earlier try.
    (stored / "torn").write_bytes(files["torn"].read_bytes()[: 2 * MB])
    (stored / "whole").write_bytes(files["whole"].read_bytes())
    half = Tally(16 * MB)
    failures: list[Exception] = []

    def put() -> None:
        try:
            Uploads(served(server.uri, "killed"), UploadMeter(16 * MB, half)).put(files)
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    assert half.is_reached.wait(60)
    server.stop()
    thread.join(60)
    assert len(failures) == 1
    assert not (stored / "weights").exists() or (stored / "weights").stat().st_size < 24 * MB
    server.start()
    through, again = Proxy(server.port), Tally()
    try:
        repository = served(through.uri, "killed")
        Uploads(repository, UploadMeter(counter=again)).put(files)
        # A file with the same size was not uploaded again, but is counted.
        assert not through.paths("PUT", "/whole")
        assert again.num_bytes == 30 * MB
        assert_has(repository, files, tmp_path / "fetched")
    finally:
        through.close()


def test_file_is_not_sent_again_when_it_is_there_in_its_size(through: Proxy, tmp_path: Path) -> None:
    files, sent = make(tmp_path, weights=2 * MB, manifest=1000), Tally()
    repository = served(through.uri, "twice")
    Uploads(repository, UploadMeter()).put(files)
    assert len(through.paths("PUT")) == 2
    Uploads(repository, UploadMeter(counter=sent)).put(files)
    # A small one may have changed and kept its size.
    assert [path.rpartition("/")[2] for path in through.paths("PUT")[2:]] == ["manifest"]
    assert sent.num_bytes == 2 * MB + 1000


def test_error_names_the_file_when_the_store_does_not_have_it_whole(server: MlflowServer, tmp_path: Path) -> None:
    files = make(tmp_path, weights=2 * MB)
    repository = served(server.uri, "lost")
    has_sizes = repository.list_artifacts

    def list_artifacts() -> Any:
        # Lost between the server's answer and the comparison.
        if (stored := server.directory / "files" / "lost" / "weights").exists():
            os.truncate(stored, MB)
        return has_sizes()

    repository.list_artifacts = list_artifacts
    with pytest.raises(UploadError, match=f"weights has {MB} bytes and not {2 * MB}"):
        Uploads(repository, UploadMeter()).put(files)


# ------------------------------------------------------------------------- the pace


@pytest.mark.parametrize("way", ["whole", "parts", "s3"])
def test_rate_is_kept_when_there_is_a_limit(
    server: MlflowServer, s3: S3, s3_server: MlflowServer, tmp_path: Path, way: str
) -> None:
    repository = {
        "whole": lambda: served(server.uri, "paced"),
        "parts": lambda: served(s3_server.uri, "paced"),
        "s3": lambda: get_artifact_repository(f"s3://{BUCKET}/paced"),
    }[way]()
    size, rate = (LARGE_BYTES, 40 * MB) if way == "parts" else (8 * MB, 8 * MB)
    files = make(tmp_path, one=size // 2, two=size // 2) if way != "parts" else make(tmp_path, one=size)
    begun_s = time.monotonic()
    Uploads(repository, UploadMeter(rate)).put(files)
    took_s = time.monotonic() - begun_s
    assert 0.98 * size / rate < took_s < 1.5 * size / rate + 1.5
