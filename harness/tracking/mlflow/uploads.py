"""Upload a model's files to MLflow's artifact store: several files at once, large ones in parts.

MLflow's `log_artifacts` uploads one file at a time with the timeout of a small request, so a server that forwards a
gigabyte to S3 before it responds would always time out. This module uses multipart uploads if the server offers them,
boto3's multipart uploads for S3, and whole files for other stores.
"""

from __future__ import annotations

import os
import posixpath
import random
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import requests
from mlflow.entities.multipart_upload import MultipartUploadPart
from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD, MLFLOW_S3_IGNORE_TLS
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from mlflow.utils.rest_utils import http_request

_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 8
PART_BYTES = 16 * 1024**2
# Smaller files are uploaded whole, because a multipart upload of one part only adds requests.
_MULTIPART_FROM_BYTES = 2 * PART_BYTES
_MAX_PARTS = 10_000  # the limit of S3
_MAX_CHUNK_BYTES, _MIN_CHUNK_BYTES = 1024**2, 16 * 1024
_MAX_TRIES_PER_PART = 4
# Timeout of a response, plus time for a server that first forwards the whole body to its store at this rate.
_RESPONSE_S = 60.0
_SLOWEST_BYTES_PER_S = 2 * 1024**2
_CONNECT_S = 10.0
# Smaller files are uploaded again; larger ones are not, if the store has them in the same size.
_TRUSTED_FROM_BYTES = 1024**2

# Statuses of a server without multipart uploads.
_NO_MULTIPART = frozenset({400, 404, 405, 501})


class UploadError(Exception):
    """The store accepted a file but does not have its full size."""


class ByteCounter(Protocol):
    """Counts the bytes that were sent."""

    def add_sent(self, num_bytes: int) -> None:
        """Add bytes, or subtract bytes that must be sent again. Any thread."""


class UploadMeter:
    """Limits the total rate of all uploads, if `bytes_per_s` is given, and counts their bytes. Any thread."""

    def __init__(self, bytes_per_s: float | None = None, counter: ByteCounter | None = None) -> None:
        self._bytes_per_s = bytes_per_s
        self._counter = counter
        self._lock = threading.Lock()
        self._free_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        """Size of a chunk, small under a low limit, because an idle connection would time out."""
        if self._bytes_per_s is None:
            return _MAX_CHUNK_BYTES
        return max(_MIN_CHUNK_BYTES, min(_MAX_CHUNK_BYTES, int(self._bytes_per_s / 100)))

    def acquire(self, num_bytes: int) -> None:
        """Wait until these bytes may be sent."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + num_bytes / self._bytes_per_s
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))

    def add(self, num_bytes: int) -> None:
        """Count sent bytes, or subtract bytes that must be sent again."""
        if self._counter is not None:
            self._counter.add_sent(num_bytes)


class Uploads:
    """Uploads files to one directory of an artifact store.

    Effects: one thread at a time; `put` starts and joins threads, and blocks on the network, with timeouts.
    """

    def __init__(self, repository: Any, meter: UploadMeter) -> None:
        self._repository = repository
        self._meter = meter
        self._parts_per_file = _PARTS_AT_ONCE
        self._has_multipart = not MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD.is_set() or bool(
            MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD.get()
        )

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload the files and verify their sizes.

        A large file that the store has in the same size is skipped. This is safe because a checkpoint's files never
        change and a partial upload is invisible or smaller.

        Raises:
            UploadError: if the store does not have a file in its full size afterwards.
            Exception: the store's error.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        there = self._sizes() if max(sizes.values(), default=0) >= _TRUSTED_FROM_BYTES else {}
        missing = [name for name, size in sizes.items() if size < _TRUSTED_FROM_BYTES or there.get(name) != size]
        for name in files.keys() - set(missing):
            self._meter.add(sizes[name])
        num_large = sum(sizes[name] >= _MULTIPART_FROM_BYTES for name in missing)
        self._parts_per_file = _PARTS_AT_ONCE // max(1, min(num_large, _FILES_AT_ONCE))
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool, ThreadPoolExecutor(_PARTS_AT_ONCE) as parts:
            largest_first = sorted(missing, key=lambda name: -sizes[name])
            _results_of([pool.submit(self._put_file, files[name], name, sizes[name], parts) for name in largest_first])
        there = self._sizes()
        wrong = [
            f"{name} has {there.get(name)} bytes and not {size}"
            for name, size in sizes.items()
            if there.get(name) != size
        ]
        if wrong:
            raise UploadError(f"not whole in the artifact store: {', '.join(wrong[:3])}")

    def _sizes(self) -> dict[str, int | None]:
        return {found.path: found.file_size for found in self._repository.list_artifacts() if not found.is_dir}

    def _put_file(self, path: Path, name: str, size_bytes: int, parts: ThreadPoolExecutor) -> None:
        if isinstance(self._repository, S3ArtifactRepository):
            self._put_to_s3(path, name)
        elif not isinstance(self._repository, HttpArtifactRepository):
            self._meter.acquire(size_bytes)
            self._repository.log_artifact(str(path))
            self._meter.add(size_bytes)
        elif size_bytes < _MULTIPART_FROM_BYTES or not self._put_in_parts(path, name, size_bytes, parts):
            self._put_whole(path, name, size_bytes)

    # ------------------------------------------------------------------- through a server

    def _put_whole(self, path: Path, name: str, size_bytes: int) -> None:
        response = http_request(
            self._repository._host_creds,
            posixpath.join("/", name),
            "PUT",
            data=_Body(path, 0, size_bytes, self._meter),
            extra_headers={"Content-Type": "application/octet-stream"},
            timeout=_timeouts_s(size_bytes),
        )
        _require_success(response)

    def _put_in_parts(self, path: Path, name: str, size_bytes: int, pool: ThreadPoolExecutor) -> bool:
        """Upload a file in parts; False if the server has no multipart uploads or the parts' store fails."""
        if not self._has_multipart:
            return False
        part_bytes = max(PART_BYTES, -(-size_bytes // _MAX_PARTS))
        num_parts = -(-size_bytes // part_bytes)
        try:
            created = self._repository.create_multipart_upload(name, num_parts)
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code not in _NO_MULTIPART:
                raise
            self._has_multipart = False
            return False
        parts = [
            _Body(path, start, min(part_bytes, size_bytes - start), self._meter)
            for start in range(0, size_bytes, part_bytes)
        ]
        try:
            done = _results_of(
                [
                    pool.submit(_put_part, part, credential)
                    for part, credential in zip(parts, created.credentials, strict=True)
                ]
            )
            done.sort(key=lambda part: int(part.part_number))
        except BaseException as error:
            self._abort(name, created.upload_id)
            for part in parts:
                part.reset_count()
            if isinstance(error, (requests.ConnectionError, requests.HTTPError)):
                # The server's store may be unreachable or closed to this host, so the server gets the whole file.
                self._has_multipart = False
                return False
            raise
        try:
            self._repository.complete_multipart_upload(name, created.upload_id, done)
        except BaseException:
            self._abort(name, created.upload_id)
            raise
        return True

    def _abort(self, name: str, upload_id: str | None) -> None:
        try:
            self._repository.abort_multipart_upload(name, upload_id)
        except Exception:  # the store expires the parts; the caller handles the original error
            return

    # ------------------------------------------------------------------------------ to S3

    def _put_to_s3(self, path: Path, name: str) -> None:
        bucket, prefix = self._repository.parse_s3_compliant_uri(self._repository.artifact_uri)
        client = _MeteredClient(self._repository._get_s3_client(), self._meter, self._parts_per_file)
        self._repository._upload_file(client, str(path), bucket, posixpath.join(prefix, name))


class _MeteredClient:
    """An S3 client that uploads in parts of `PART_BYTES` and meters them."""

    def __init__(self, client: Any, meter: UploadMeter, parts_at_once: int) -> None:
        self._client = client
        self._meter = meter
        self._parts_at_once = parts_at_once

    def upload_file(self, **arguments: Any) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=_MULTIPART_FROM_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=self._parts_at_once,
        )
        self._client.upload_file(**arguments, Config=config, Callback=self._on_sent)

    def _on_sent(self, num_bytes: int) -> None:
        self._meter.add(num_bytes)
        # boto3 calls this in the sending thread, so waiting here limits the rate.
        self._meter.acquire(max(0, num_bytes))


class _Body:
    """The body of a request: a range of a file in metered chunks, which can be iterated again for a retry."""

    def __init__(self, path: Path, start: int, size_bytes: int, meter: UploadMeter) -> None:
        self._path, self._start, self._size_bytes = path, start, size_bytes
        self._meter = meter
        self._num_sent = 0

    def __len__(self) -> int:
        return self._size_bytes

    def reset_count(self) -> None:
        self._meter.add(-self._num_sent)
        self._num_sent = 0

    def __iter__(self) -> Iterator[bytes]:
        self.reset_count()
        file = os.open(self._path, os.O_RDONLY)
        try:
            while self._num_sent < self._size_bytes:
                wanted = min(self._meter.chunk_bytes, self._size_bytes - self._num_sent)
                chunk = os.pread(file, wanted, self._start + self._num_sent)
                if not chunk:
                    raise UploadError(f"{self._path}: was truncated while it was uploaded")
                self._meter.acquire(len(chunk))
                yield chunk
                self._num_sent += len(chunk)
                self._meter.add(len(chunk))
        finally:
            os.close(file)


def _put_part(part: _Body, credential: Any) -> MultipartUploadPart:
    for tried in range(1, _MAX_TRIES_PER_PART + 1):
        try:
            response = requests.put(
                credential.url,
                data=part,
                headers=credential.headers,
                verify=not MLFLOW_S3_IGNORE_TLS.get(),
                timeout=_timeouts_s(len(part)),
            )
            _require_success(response)
            return MultipartUploadPart(credential.part_number, response.headers.get("ETag", ""), credential.url)
        except requests.RequestException:
            if tried == _MAX_TRIES_PER_PART:
                raise
            time.sleep(random.uniform(0.5, 1.0) * 2**tried)
    raise AssertionError


def _require_success(response: requests.Response) -> None:
    try:
        response.raise_for_status()
    except requests.HTTPError as error:
        raise requests.HTTPError(f"{error}: {response.text[:300]}", response=response) from None


def _timeouts_s(size_bytes: int) -> tuple[float, float]:
    """Return the timeouts of connect and response."""
    return _CONNECT_S, _RESPONSE_S + size_bytes / _SLOWEST_BYTES_PER_S


def _results_of(futures: list[Future[Any]]) -> list[Any]:
    """Return all results in order; after the first failure, cancel the futures that have not started.

    No future is running when this returns or raises, so that a multipart upload can be aborted.
    """
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        return [future.result() for future in futures if future.done()]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
