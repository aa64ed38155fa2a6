"""A model's files into MLflow's artifact store: several at once, the large ones by parts.

MLflow's own `log_artifacts` takes file after file, and waits for each answer as long as for any small request: a
server that hands a gigabyte on to S3 before it answers would be given up each time. What goes to a server that
offers parts goes by parts; S3 that is written to directly has them of its own; other stores get whole files.
"""

from __future__ import annotations

import os
import posixpath
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import requests
from mlflow.entities.multipart_upload import MultipartUploadPart
from mlflow.environment_variables import MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD, MLFLOW_S3_IGNORE_TLS
from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository
from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository
from mlflow.utils.rest_utils import http_request

_FILES_AT_ONCE = 4
_PARTS_AT_ONCE = 8
PART_BYTES = 16 * 1024**2
# Below two parts, asking for places to put them costs more than it gives.
_BY_PARTS_FROM_BYTES = 2 * PART_BYTES
_MAX_PARTS = 10_000  # of S3
_MAX_CHUNK_BYTES, _MIN_CHUNK_BYTES = 1024**2, 16 * 1024
_TRIES_OF_A_PART = 4
# How long an answer may take: a server may first hand all of it on to a store behind it, at this pace.
_ANSWER_S = 60.0
_SLOWEST_BYTES_PER_S = 2 * 1024**2
# An address for parts that nobody answers at is given up sooner: the server itself takes the file.
_CONNECT_S = 10.0
# What is smaller is sent again rather than taken for the same by its size.
_TRUSTED_FROM_BYTES = 1024**2

# Statuses with which a server says that it has no uploads by parts.
_NO_PARTS = frozenset({400, 404, 405, 501})


class UploadError(Exception):
    """The store has taken a file and does not have it whole."""


class Pace:
    """At most so many bytes a second, over all threads that ask.

    Args:
        bytes_per_s: the limit; None: there is none.
    """

    def __init__(self, bytes_per_s: float | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_s = 0.0

    @property
    def chunk_bytes(self) -> int:
        """How much goes at once: little under a low limit, or a connection that waits for its turn looks dead."""
        if self._bytes_per_s is None:
            return _MAX_CHUNK_BYTES
        return max(_MIN_CHUNK_BYTES, min(_MAX_CHUNK_BYTES, int(self._bytes_per_s / 100)))

    def take(self, num_bytes: int) -> None:
        """Wait until these bytes may go."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            begin_s = max(time.monotonic(), self._free_s)
            self._free_s = begin_s + num_bytes / self._bytes_per_s
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))


class Uploads:
    """Brings files to one place in an artifact store.

    Effects: not collective; any thread, one at a time; `put` blocks on the network, with a limit for each request;
    nothing on disk. It starts threads, which end with `put`.

    Args:
        repository: MLflow's, of that place.
        pace: the limit of the rate.
        sent: told of the bytes that went, negative where some go again; from any thread.
    """

    def __init__(self, repository: Any, pace: Pace, sent: Callable[[int], None] = lambda num_bytes: None) -> None:
        self._repository = repository
        self._pace = pace
        self._sent = sent
        self._parts_of_a_file = _PARTS_AT_ONCE
        self._has_parts = not MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD.is_set() or bool(
            MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD.get()
        )

    def put(self, files: Mapping[str, Path]) -> None:
        """Have the files there, each whole.

        A large one that is there already in its size was brought by an earlier try: files of a checkpoint never
        change, and stores show them under their names only once they are whole, or in a smaller size.

        Raises:
            UploadError: if the store does not have one in its size in the end.
            Exception: the store's own.
        """
        sizes = {name: path.stat().st_size for name, path in files.items()}
        there = self._sizes() if max(sizes.values(), default=0) >= _TRUSTED_FROM_BYTES else {}
        missing = [name for name, size in sizes.items() if size < _TRUSTED_FROM_BYTES or there.get(name) != size]
        for name in files.keys() - set(missing):
            self._sent(sizes[name])
        num_large = sum(sizes[name] >= _BY_PARTS_FROM_BYTES for name in missing)
        self._parts_of_a_file = _PARTS_AT_ONCE // max(1, min(num_large, _FILES_AT_ONCE))
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool, ThreadPoolExecutor(_PARTS_AT_ONCE) as parts:
            largest_first = sorted(missing, key=lambda name: -sizes[name])
            _all([pool.submit(self._put_file, files[name], name, sizes[name], parts) for name in largest_first])
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
            self._pace.take(size_bytes)
            self._repository.log_artifact(str(path))
            self._sent(size_bytes)
        elif size_bytes < _BY_PARTS_FROM_BYTES or not self._put_by_parts(path, name, size_bytes, parts):
            self._put_whole(path, name, size_bytes)

    # ------------------------------------------------------------------- by way of a server

    def _put_whole(self, path: Path, name: str, size_bytes: int) -> None:
        response = http_request(
            self._repository._host_creds,
            posixpath.join("/", name),
            "PUT",
            data=_Body(path, 0, size_bytes, self._pace, self._sent),
            extra_headers={"Content-Type": "application/octet-stream"},
            timeout=_limits_s(size_bytes),
        )
        _require_success(response)

    def _put_by_parts(self, path: Path, name: str, size_bytes: int, pool: ThreadPoolExecutor) -> bool:
        """Whether the server has it now; False: it offers no parts, or whom it names for them is not reached."""
        if not self._has_parts:
            return False
        part_bytes = max(PART_BYTES, -(-size_bytes // _MAX_PARTS))
        num_parts = -(-size_bytes // part_bytes)
        try:
            created = self._repository.create_multipart_upload(name, num_parts)
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code not in _NO_PARTS:
                raise
            self._has_parts = False
            return False
        parts = [
            _Body(path, start, min(part_bytes, size_bytes - start), self._pace, self._sent)
            for start in range(0, size_bytes, part_bytes)
        ]
        try:
            done = _all(
                [
                    pool.submit(_put_part, part, credential)
                    for part, credential in zip(parts, created.credentials, strict=True)
                ]
            )
            done.sort(key=lambda part: int(part.part_number))
        except BaseException as error:
            self._abort(name, created.upload_id)
            for part in parts:
                part.take_back()
            if isinstance(error, (requests.ConnectionError, requests.HTTPError)):
                # The store behind the server may be out of reach from here, or closed to us; the server itself is not.
                self._has_parts = False
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
        except Exception:  # what is left of it is the store's to clear away; the error that led here is told
            return

    # ------------------------------------------------------------------------------ to S3

    def _put_to_s3(self, path: Path, name: str) -> None:
        bucket, prefix = self._repository.parse_s3_compliant_uri(self._repository.artifact_uri)
        client = _PacedClient(self._repository._get_s3_client(), self._told, self._parts_of_a_file)
        self._repository._upload_file(client, str(path), bucket, posixpath.join(prefix, name))

    def _told(self, num_bytes: int) -> None:
        self._sent(num_bytes)
        # In the thread that sends: this is what slows it down.
        self._pace.take(max(0, num_bytes))


class _PacedClient:
    """An S3 client whose uploads go by parts of our size, and tell of themselves."""

    def __init__(self, client: Any, told: Callable[[int], None], parts_at_once: int) -> None:
        self._client = client
        self._told = told
        self._parts_at_once = parts_at_once

    def upload_file(self, **arguments: Any) -> None:
        from boto3.s3.transfer import TransferConfig

        config = TransferConfig(
            multipart_threshold=_BY_PARTS_FROM_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=self._parts_at_once,
        )
        self._client.upload_file(**arguments, Config=config, Callback=self._told)


class _Body:
    """A range of a file as a request's body: in large chunks, paced and told of. Iterated again, it begins again."""

    def __init__(self, path: Path, start: int, size_bytes: int, pace: Pace, sent: Callable[[int], None]) -> None:
        self._path, self._start, self._size_bytes = path, start, size_bytes
        self._pace = pace
        self._sent = sent
        self._num_sent = 0

    def __len__(self) -> int:
        return self._size_bytes

    def take_back(self) -> None:
        """What went of it was in vain."""
        self._sent(-self._num_sent)
        self._num_sent = 0

    def __iter__(self) -> Iterator[bytes]:
        self.take_back()
        file = os.open(self._path, os.O_RDONLY)
        try:
            while self._num_sent < self._size_bytes:
                wanted = min(self._pace.chunk_bytes, self._size_bytes - self._num_sent)
                chunk = os.pread(file, wanted, self._start + self._num_sent)
                if not chunk:
                    raise UploadError(f"{self._path}: became shorter while it was read")
                self._pace.take(len(chunk))
                yield chunk
                self._num_sent += len(chunk)
                self._sent(len(chunk))
        finally:
            os.close(file)


def _put_part(part: _Body, credential: Any) -> MultipartUploadPart:
    for tried in range(1, _TRIES_OF_A_PART + 1):
        try:
            response = requests.put(
                credential.url,
                data=part,
                headers=credential.headers,
                verify=not MLFLOW_S3_IGNORE_TLS.get(),
                timeout=_limits_s(len(part)),
            )
            _require_success(response)
            return MultipartUploadPart(credential.part_number, response.headers.get("ETag", ""), credential.url)
        except requests.RequestException:
            if tried == _TRIES_OF_A_PART:
                raise
            time.sleep(random.uniform(0.5, 1.0) * 2**tried)
    raise AssertionError


def _require_success(response: requests.Response) -> None:
    try:
        response.raise_for_status()
    except requests.HTTPError as error:
        # What a store says of itself is in the body.
        raise requests.HTTPError(f"{error}: {response.text[:300]}", response=response) from None


def _limits_s(size_bytes: int) -> tuple[float, float]:
    """Of connecting, and of the answer."""
    return _CONNECT_S, _ANSWER_S + size_bytes / _SLOWEST_BYTES_PER_S


def _all(futures: list[Future[Any]]) -> list[Any]:
    """Results of all, in their order; the first failure keeps those from beginning that have not begun.

    None is at work when this returns or raises: what it began can be taken back.
    """
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        return [future.result() for future in futures if future.done()]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
