"""Uploading a checkpoint to a store: its speed beside the same file sent by hand, and its effect on training steps.

    local       the server's own disk, through the server, without parts; the peer is one PUT
    s3          S3 directly; the peers are parts sent by hand, eight at a time of 32 MiB, and boto3's `upload_file`
    s3_proxied  S3 behind a server that returns presigned addresses of parts; the peers are those of `s3`

Ours is a whole publication: create the model, upload its files, check them, link them, and set the model to READY.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch

from benchmarks.tracking import goal, over, p99, publisher_log, tracked
from harness.tracking.journal.delivery_state import read_delivered
from tests.services.mlflow_server import MlflowServer
from tests.services.s3_server import BUCKET, S3Server

STORES = ("local", "s3", "s3_proxied")
MIB = 1024**2
PART_BYTES = 32 * MIB
PARTS_AT_ONCE = 8
WEIGHTS = "model.safetensors"
# Minimum of a window without an upload, which has as many steps as the last one with an upload.
MIN_STEPS = 100


def make_weights(directory: Path, size_mb: int) -> Path:
    """Write a file without repetition within a part."""
    path = directory / WEIGHTS
    block = random.Random(0).randbytes(PART_BYTES + 1)
    with path.open("wb") as stream:
        left = size_mb * MIB
        while left:
            left -= stream.write(block[:left])
    return path


def make_checkpoint(directory: Path, weights: Path, number: int) -> dict[str, Any]:
    """Make a checkpoint's directory with weights, and its journal entry."""
    name = f"step-{number:08d}"
    (directory / name).mkdir(parents=True)
    os.link(weights, directory / name / WEIGHTS)
    (directory / name / "manifest.json").write_text("{}")  # published as it is: nothing here reads it
    return {
        "name": name,
        "key": f"{directory.parent.name}-{number}",  # of one that is there already nothing is sent
        "epoch": 0,
        "step": number,
        "files": [WEIGHTS, "manifest.json"],
        "resume_files": [],
        "log_resume_state": "none",
        "metrics": [],
        "monitored": None,
        "time_ms": time.time_ns() // 1_000_000,
        "size_bytes": weights.stat().st_size,
    }


# ---------------------------------------------------------------------------------------- upload


@dataclass(frozen=True)
class Target:
    """The destination of a store's uploads, for ours and for the peers, and how it is emptied."""

    server: MlflowServer
    artifact_location: str | None
    peers: dict[str, Callable[[Path], None]]
    empty: Callable[[], None]


def measure_upload(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return MB per second of each store and peer, in turn."""
    weights = make_weights(directory, arguments.size_mb)
    found, goals = {}, []
    for store in arguments.stores.split(","):
        with target(store, directory / store) as where:
            found[store] = measure_store(where, weights, arguments.rounds, directory / store)
        ratio = found[store]["over_by_hand"]["median"]
        goals.append(goal(f"upload of {arguments.size_mb} MiB, {store}, over by hand", 0.9, ratio, "x", at_least=True))
    return {"size_mb": arguments.size_mb, "stores": found, "goals": goals}


@contextmanager
def target(store: str, directory: Path) -> Iterator[Target]:
    directory.mkdir()
    with ExitStack() as stack:
        if store == "local":
            server = MlflowServer(directory / "server")
            stack.callback(server.stop)
            server.start()
            files = directory / "server" / "files"
            put = f"{server.uri}/api/2.0/mlflow-artifacts/artifacts/by_hand/{WEIGHTS}"
            yield Target(server, None, {"by_hand": lambda path: put_whole(put, path)}, lambda: remove_below(files))
            return
        s3 = S3Server(directory / "s3")
        stack.callback(s3.stop)
        s3.start()
        is_proxied = store == "s3_proxied"
        server = MlflowServer(
            directory / "server",
            artifacts=("--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/proxied")
            if is_proxied
            else None,
            extra={**s3.variables, "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "true"},
        )
        stack.callback(server.stop)
        server.start()
        before = dict(os.environ)
        stack.callback(lambda: (os.environ.clear(), os.environ.update(before)))
        if not is_proxied:
            os.environ.update(s3.variables)  # a client that is to write to S3 itself needs to know where it is
        client = s3.client()
        yield Target(
            server,
            None if is_proxied else f"s3://{BUCKET}/direct",
            {
                "by_hand": lambda path: put_by_parts(client, path),
                "boto3": lambda path: client.upload_file(str(path), BUCKET, "boto3"),
            },
            s3.remove_all,
        )


def measure_store(where: Target, weights: Path, rounds: int, directory: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    from harness.tracking.mlflow.store import MlflowStore
    from harness.tracking.mlflow.store_protocol import WantedRun

    MlflowClient(where.server.uri).create_experiment("uploads", artifact_location=where.artifact_location)
    store = MlflowStore(where.server.uri)
    store.open_run(WantedRun("key", "uploads", "uploads"))
    number = 0

    def ours(path: Path) -> None:
        record = make_checkpoint(directory, path, number)
        store.log_checkpoint(record, directory / record["name"], None, None)

    peers = {"ours": ours, **where.peers}
    times: dict[str, list[float]] = {name: [] for name in peers}
    order = random.Random(0)
    for round_number in range(rounds + 1):
        names = list(peers)
        order.shuffle(names)
        for name in names:
            number += 1
            begun_s = time.perf_counter()
            peers[name](weights)
            took_s = time.perf_counter() - begun_s
            where.empty()
            if round_number:
                times[name].append(took_s)
    size_mb = weights.stat().st_size / 1e6
    figures: dict[str, Any] = {
        "mb_per_s": {name: over([size_mb / took_s for took_s in found]) for name, found in times.items()}
    }
    for name in where.peers:
        figures[f"over_{name}"] = over([hand / mine for mine, hand in zip(times["ours"], times[name], strict=True)])
    return figures


def put_whole(url: str, path: Path) -> None:
    with path.open("rb") as stream:
        requests.put(url, data=stream, timeout=600).raise_for_status()


def put_by_parts(client: Any, path: Path) -> None:
    """Upload in parts as in S3's documentation."""
    where = {"Bucket": BUCKET, "Key": "by_hand"}
    upload = where | {"UploadId": client.create_multipart_upload(**where)["UploadId"]}

    def put(number: int) -> dict[str, Any]:
        with path.open("rb") as stream:
            stream.seek((number - 1) * PART_BYTES)
            answer = client.upload_part(**upload, PartNumber=number, Body=stream.read(PART_BYTES))
        return {"PartNumber": number, "ETag": answer["ETag"]}

    num_parts = -(-path.stat().st_size // PART_BYTES)
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        parts = list(pool.map(put, range(1, num_parts + 1)))
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})


def remove_below(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path)


# ------------------------------------------------------------------------------------------ step


def measure_step(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return the ratio of the steps' 99th percentiles with and without an upload; and between two without."""
    weights = make_weights(directory, arguments.size_mb)
    server = MlflowServer(directory / "server")
    server.start()
    found, goals = {}, []
    before = os.sched_getaffinity(0)
    try:
        for name, is_pinned in (("a core to spare", True), ("no core of its own", False)):
            run_dir = directory / name.replace(" ", "_")
            with tracked(run_dir, server.uri) as tracker:
                assert tracker._publisher is not None and tracker._publisher.process is not None
                others = [*server.pids, tracker._publisher.process.pid]
                if is_pinned and len(before) > 1:
                    own, *rest = sorted(before)
                    pin([os.getpid()], {own})
                    pin(others, set(rest))
                found[name] = steps_beside_uploads(arguments, run_dir, tracker, weights, directory / "server" / "files")
                pin([os.getpid(), *server.pids], before)
            if is_pinned:
                seen = found[name]["p99_over_without"]["median"]
                goals.append(goal(f"step's p99 while {arguments.size_mb} MiB go, {name}", 1.1, seen, "x"))
    finally:
        server.stop()
    return {"size_mb": arguments.size_mb, **found, "goals": goals}


def steps_beside_uploads(
    arguments: argparse.Namespace, run_dir: Path, tracker: Any, weights: Path, uploaded: Path
) -> dict[str, Any]:
    step = make_step(arguments.step_ms)
    outbox_dir = run_dir / "outbox"
    windows: dict[str, list[list[float]]] = {"with": [], "without": [], "control": []}
    num_steps = MIN_STEPS
    rates: list[float] = []
    order = random.Random(0)
    for round_number in range(arguments.rounds + 1):
        names = list(windows)
        order.shuffle(names)
        for name in names if round_number else ["with"]:
            if name != "with":
                times = [step() for _ in range(num_steps)]
            else:
                record = make_checkpoint(
                    run_dir / "checkpoints", weights, len(list((run_dir / "checkpoints").iterdir()))
                )
                begun_s = time.monotonic()
                tracker.log_checkpoint(record)
                times = []
                while record["name"] not in read_delivered(outbox_dir).models:
                    times += [step() for _ in range(5)]
                    assert time.monotonic() - begun_s < 600, publisher_log(run_dir)
                rates.append(weights.stat().st_size / 1e6 / (time.monotonic() - begun_s))
                num_steps = max(MIN_STEPS, len(times))
                remove_below(uploaded)
            if round_number:
                windows[name].append(times)
    p99s = {name: [p99(times) for times in found] for name, found in windows.items()}
    medians = {name: [statistics.median(times) for times in found] for name, found in windows.items()}

    def ratios(figures: dict[str, list[float]], name: str) -> dict[str, Any]:
        return over([mine / other for mine, other in zip(figures[name], figures["without"], strict=True)])

    return {
        "step_ms": {name: over(found) for name, found in medians.items()},
        "p99_ms": {name: over(found) for name, found in p99s.items()},
        "p99_over_without": ratios(p99s, "with"),
        "p99_control_over_without": ratios(p99s, "control"),
        "median_over_without": ratios(medians, "with"),
        "median_control_over_without": ratios(medians, "control"),
        "steps_per_window": statistics.median(len(times) for times in windows["with"]),
        "upload_mb_per_s": over(rates),
    }


def make_step(wanted_ms: float) -> Callable[[], float]:
    """Return a training step of about the given duration, which returns its time in milliseconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def layers(number: int) -> Callable[[], float]:
        model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(number)))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        batch = torch.randn(128, 256)

        def step() -> float:
            begun_s = time.perf_counter()
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            return 1e3 * (time.perf_counter() - begun_s)

        return step

    one = layers(8)
    took_ms = statistics.median(one() for _ in range(50))
    return layers(max(1, round(8 * wanted_ms / took_ms)))


def pin(pids: list[int], cores: set[int]) -> None:
    """Pin all threads of these processes, and those that they start, to these cores."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*"):
            try:
                os.sched_setaffinity(int(task.name), cores)
            except ProcessLookupError:
                continue
