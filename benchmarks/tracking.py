"""What tracking costs the trainer, and how fast the publisher delivers to MLflow, beside peers in one run.

    python benchmarks/tracking.py --json
    python benchmarks/tracking.py --only log,append --json
    python benchmarks/tracking.py --only delivery --num_points 200000 --num_metrics 1 --rounds 1 --json
    python benchmarks/tracking.py --only upload --stores s3 --size_mb 256 --rounds 10

    log       `PeriodicLogger.log` of tensors, which must not synchronise with a device
    append    a row of metrics into the outbox; peer: `json.dumps` and `write` of the same row
    delivery  points from the journal until they are acknowledged, by the publisher's process; peers: a loop of
              `log_batch`, and a loop of bare requests with the same points, which is the server's limit
    upload    a checkpoint to a store; peer: the same file sent by hand, see `benchmarks.uploads`
    step      the trainer's steps while the publisher uploads, see `benchmarks.uploads`

Peers alternate in short rounds, since a shared machine's speed changes; a figure is a median over many rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig  # noqa: E402
from harness.config.schema import TrainerConfig  # noqa: E402
from harness.distributed.strategies import start  # noqa: E402
from harness.metrics.reducer import WeightedSums  # noqa: E402
from harness.tracking.journal.delivery_state import read_delivered  # noqa: E402
from harness.tracking.journal.entries import journal_end  # noqa: E402
from harness.tracking.journal.writer import JournalWriter  # noqa: E402
from harness.tracking.tracker import Tracker  # noqa: E402
from tests.services.mlflow_server import MlflowServer  # noqa: E402

PARTS = ("log", "append", "delivery", "upload", "step")
NUM_METRICS = 20
# The default of `tracking.log_every_n_steps`.
CALLS_PER_WINDOW = 10
POINTS_PER_REQUEST = 1000
PUBLISHER_NICE = 10
LIMIT_S = 600


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return medians[50], medians[1949]


def over(values: list[float]) -> dict[str, Any]:
    """Return the median of many windows with its interval, and the minimum."""
    return {"median": statistics.median(values), "95": interval(values), "min": min(values)}


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]


def goal(name: str, limit: float, seen: float, unit: str, *, at_least: bool = False) -> dict[str, Any]:
    """Print one line of the table."""
    is_met = seen >= limit if at_least else seen <= limit
    return {"name": name, "at_least" if at_least else "at_most": limit, "seen": seen, "unit": unit, "met": is_met}


# ------------------------------------------------------------------------------------------- log


class Operators(TorchDispatchMode):
    """Counts the calls of PyTorch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def measure_log(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return microseconds per call, over windows of ten calls; the reduction after each window is not measured."""
    torch.set_num_threads(1)
    numbers = torch.rand(NUM_METRICS)
    plain = {f"train/metric_{i}": number for i, number in enumerate(numbers.unbind())}
    weight = torch.ones((), requires_grad=True)
    loss = {**plain, "train/metric_0": 2 * weight}
    kinds = {"host": (plain, False), "device": (plain, True), "device, one with a gradient": (loss, True)}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    flushes: list[float] = []
    checkpoint = CheckpointConfig(every_n_epochs=None, save_last=False)
    with PeriodicLogger(
        start(TrainerConfig(), seed=0),
        None,
        run_name="log",
        run_dir=directory,
        checkpoint=checkpoint,
        tracking=TrackingConfig(enabled=False),
    ) as logger:
        windows = logger._metrics
        for _ in range(arguments.windows):
            for name, (values, is_held) in kinds.items():
                # Tensors in host memory take the way of a device's, which keeps them and reads nothing.
                windows._train = windows._target = WeightedSums(holds_all=is_held)
                logger.log(values, 8)
                begun_s = time.perf_counter()
                for _ in range(CALLS_PER_WINDOW):
                    logger.log(values, 8)
                logged_s = time.perf_counter()
                times[name].append(1e6 * (logged_s - begun_s) / CALLS_PER_WINDOW)
                windows.collect()
                windows.flush(logger.step)
                if not is_held:
                    flushes.append(1e6 * (time.perf_counter() - logged_s))
                logger._state.step += CALLS_PER_WINDOW
        # These have no values at all: whatever would read one, and so wait for a device, raises.
        without_values = {name: torch.empty((), device="meta") for name in plain}
        windows._train = windows._target = WeightedSums()
        with Operators() as operators:
            for _ in range(CALLS_PER_WINDOW):
                logger.log(without_values, 8)
        windows._train = windows._target = WeightedSums()
    figures = {name: over(found) for name, found in times.items()}
    goals = [goal(f"log, 20 tensors, {name}", 20.0, figures[name]["median"], "us") for name in kinds]
    goals.append(goal("log: operators run on the device", 0, len(operators.names), "operators"))
    return {"us_per_call": figures, "reduction_us_per_window": over(flushes), "goals": goals}


# ---------------------------------------------------------------------------------------- append


def measure_append(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return microseconds per row, alternating with a plain write."""
    draw = random.Random(0)
    outbox = JournalWriter(directory / "append")
    descriptor = os.open(directory / "by_hand.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def by_hand(body: dict[str, Any]) -> None:
        record = {"kind": "metrics", "time_ms": time.time_ns() // 1_000_000, "body": body}
        os.write(descriptor, (json.dumps(record) + "\n").encode())

    peers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "ours": lambda body: outbox.append("metrics", body),
        "by_hand": by_hand,
    }
    medians: dict[str, list[float]] = {name: [] for name in peers}
    tails: dict[str, list[float]] = {name: [] for name in peers}
    for window in range(arguments.windows + 1):
        for name in sorted(peers, reverse=window % 2 == 0):
            append, times = peers[name], []
            for step in range(200):
                # As they come out of a reduction: all digits there are.
                body = {"step": step, "values": {f"train/metric_{i}": draw.random() for i in range(NUM_METRICS)}}
                begun_ns = time.perf_counter_ns()
                append(body)
                times.append((time.perf_counter_ns() - begun_ns) / 1e3)
            if window:
                medians[name].append(statistics.median(times))
                tails[name].append(p99(times))
    outbox.close()
    os.close(descriptor)
    figures = {name: {"median_us": over(medians[name]), "p99_us": over(tails[name])} for name in peers}
    seen = figures["ours"]
    goals = [
        goal("append, 20 metrics, median", 50.0, seen["median_us"]["median"], "us"),
        goal("append, 20 metrics, p99", 50.0, seen["p99_us"]["median"], "us"),
    ]
    ratios = [mine / hand for mine, hand in zip(medians["ours"], medians["by_hand"], strict=True)]
    return {**figures, "over_by_hand": over(ratios), "goals": goals}


# -------------------------------------------------------------------------------------- delivery


@contextmanager
def tracked(run_dir: Path, tracking_uri: str, experiment: str = "benchmark") -> Iterator[Tracker]:
    """Run rank zero's tracker and publisher, without training."""
    run_dir.mkdir(parents=True)
    (run_dir / "checkpoints").mkdir()
    (run_dir / "run.json").write_text(json.dumps({"run_name": run_dir.name, "run_key": f"key-{run_dir.name}"}))
    config = TrackingConfig(tracking_uri=tracking_uri, experiment_name=experiment, start_timeout_s=120.0)
    tracker = Tracker(run_dir, config)
    tracker.start(run_dir.name, {})
    try:
        yield tracker
        assert tracker.finish("FINISHED", "the benchmark is done", 60.0, lambda left: True), publisher_log(run_dir)
    finally:
        tracker.detach()
        publisher = None if tracker._publisher is None else tracker._publisher.process
        if publisher is not None and publisher.poll() is None:
            publisher.kill()
            publisher.wait()


def publisher_log(run_dir: Path) -> str:
    return (run_dir / "outbox" / "publisher.log").read_text()[-3000:]


def wait_until(is_done: Callable[[], bool], run_dir: Path, pause_s: float = 0.002) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not is_done():
        assert time.monotonic() < deadline_s, publisher_log(run_dir)
        time.sleep(pause_s)


def measure_delivery(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Return points per second, alternating with 1,000 points per request by hand; and the time of a call meanwhile.

    The peer runs at the publisher's low priority, so that a busy machine slows both alike.
    """
    import mlflow
    import requests

    num_rows = arguments.num_points // arguments.num_metrics
    names = [f"train/metric_{i}" for i in range(arguments.num_metrics)]
    server = MlflowServer(directory / "server")
    server.start()
    try:
        client: Any = mlflow.MlflowClient(server.uri)
        ids = {
            name: client.create_run(client.create_experiment(name)).info.run_id for name in ("by_hand", "by_requests")
        }
        run_dir = directory / "delivery"
        outbox_dir = run_dir / "outbox"
        rates: dict[str, list[float]] = {"ours": [], "by_hand": [], "by_requests": []}
        next_step = dict.fromkeys(rates, 0)
        call_ms: list[float] = []
        # On Linux a thread has a priority of its own, which those that it starts take over.
        with (
            tracked(run_dir, server.uri) as tracker,
            requests.Session() as session,
            ThreadPoolExecutor(1, initializer=os.nice, initargs=(PUBLISHER_NICE,)) as by_hand_thread,
        ):

            def ours(first: int) -> None:
                for step in range(first, first + num_rows):
                    values = {name: step + i / 7 for i, name in enumerate(names)}
                    begun_s = time.perf_counter()
                    tracker.log_metrics(values, step)
                    call_ms.append(1e3 * (time.perf_counter() - begun_s))
                end = journal_end(outbox_dir)
                wait_until(lambda: read_delivered(outbox_dir).offset >= end, run_dir, pause_s=0.02)

            def batches(first: int) -> Iterator[list[tuple[str, float, int, int]]]:
                batch = []
                for step in range(first, first + num_rows):
                    now_ms = time.time_ns() // 1_000_000
                    batch += [(name, step + i / 7, now_ms, step) for i, name in enumerate(names)]
                    if len(batch) >= POINTS_PER_REQUEST:
                        yield batch
                        batch = []
                if batch:
                    yield batch

            def by_hand(first: int) -> None:
                for batch in batches(first):
                    client.log_batch(ids["by_hand"], metrics=[mlflow.entities.Metric(*point) for point in batch])

            def by_requests(first: int) -> None:
                keys = ("key", "value", "timestamp", "step")
                for batch in batches(first):
                    body = {
                        "run_id": ids["by_requests"],
                        "metrics": [dict(zip(keys, point, strict=True)) for point in batch],
                    }
                    session.post(f"{server.uri}/api/2.0/mlflow/runs/log-batch", json=body).raise_for_status()

            peers: dict[str, Callable[[int], Any]] = {
                "ours": ours,
                "by_hand": lambda first: by_hand_thread.submit(by_hand, first).result(),
                "by_requests": lambda first: by_hand_thread.submit(by_requests, first).result(),
            }
            for round_number in range(arguments.rounds + 1):
                for name in sorted(peers, reverse=round_number % 2 == 0):
                    begun_s = time.perf_counter()
                    peers[name](next_step[name])
                    took_s = time.perf_counter() - begun_s
                    next_step[name] += num_rows
                    if round_number:
                        rates[name].append(num_rows * len(names) / took_s)
            run_id = tracker.run_id
        stored = len(client.get_metric_history(run_id, "train/metric_0"))
        assert stored == next_step["ours"], f"{stored} of {next_step['ours']} points are there"
    finally:
        server.stop()
    ratios = {
        name: [mine / peer for mine, peer in zip(rates["ours"], rates[name], strict=True)]
        for name in ("by_hand", "by_requests")
    }
    figures = {name: over(found) | {"max": max(found)} for name, found in rates.items()}
    goals = [
        goal("delivery", 5000.0, figures["ours"]["median"], "points/s", at_least=True),
        goal("delivery over log_batch by hand", 0.9, statistics.median(ratios["by_hand"]), "x", at_least=True),
        goal("delivery over bare requests", 0.9, statistics.median(ratios["by_requests"]), "x", at_least=True),
    ]
    return {
        "points_per_s": figures,
        "over": {name: over(found) for name, found in ratios.items()},
        "call_ms": {"median": statistics.median(call_ms), "p99": p99(call_ms), "max": max(call_ms)},
        "num_points": arguments.num_points,
        "num_metrics": arguments.num_metrics,
        "goals": goals,
    }


# ------------------------------------------------------------------------------------------ main


def versions() -> dict[str, str]:
    from importlib.metadata import version

    found = {"python": platform.python_version()}
    for name in ("torch", "mlflow", "boto3", "moto"):
        with suppress(ImportError):
            found[name] = version(name)
    return found


def show(record: dict[str, Any]) -> None:
    for found in record["goals"]:
        bound = f"at least {found['at_least']:g}" if "at_least" in found else f"at most {found['at_most']:g}"
        verdict = "met" if found["met"] else "MISSED"
        print(f"{found['name']:50} {found['seen']:10.2f} {found['unit']:9} {bound:14} {verdict}")
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    print(f"{record['machine']}; load before and after: {load}")


def main() -> None:
    from benchmarks import uploads

    parser = argparse.ArgumentParser(description="what tracking costs, and how fast it delivers")
    parser.add_argument("--only", default=",".join(PARTS), help="some of: %(default)s")
    parser.add_argument("--windows", type=int, default=200, help="of log and append")
    parser.add_argument("--num_points", type=int, default=20_000, help="of one delivery")
    parser.add_argument("--num_metrics", type=int, default=NUM_METRICS, help="of a row of a delivery")
    parser.add_argument("--size_mb", type=int, default=1024, help="of the checkpoint, in MiB")
    parser.add_argument("--stores", default=",".join(uploads.STORES), help="of upload, some of: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of delivery, upload and step; one more to warm up")
    parser.add_argument("--step_ms", type=float, default=10.0, help="how long the trainer's step shall be, about")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measures = {
        "log": measure_log,
        "append": measure_append,
        "delivery": measure_delivery,
        "upload": uploads.measure_upload,
        "step": uploads.measure_step,
    }
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    load = [os.getloadavg()[0]]
    parts = {}
    for name in wanted:
        with tempfile.TemporaryDirectory(prefix="harness-tracking-", dir=os.environ.get("TMPDIR")) as directory:
            parts[name] = measures[name](arguments, Path(directory))
    load.append(os.getloadavg()[0])
    goals = [found for part in parts.values() for found in part.pop("goals")]
    record = {
        "benchmark": "tracking",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load": load,
        "versions": versions(),
        "goals": goals,
        **parts,
    }
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        show(record)


if __name__ == "__main__":
    main()
