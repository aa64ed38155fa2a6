"""MLflow's own asynchronous logging and ours, through the same faults: what was sent, and what MLflow has.

    python -m tests.services.mlflow_async --outage_s 60 --json

Both at the same time, by the same proxy, to the same real server: the same points at the same pace (`tracking_load`).
MLflow as it comes. What `docs/comparison.md` shows of it is `benchmarks/results/tracking_faults_60.json`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from harness.tracking.publisher.sync import deliver_rest
from tests.launching import environment
from tests.services.counting import count_of, points, read_sent, sent_points
from tests.services.faulty_proxy import Fault, FaultyProxy
from tests.services.mlflow_server import MlflowServer
from tests.services.tracking_load import Sent, metrics_at

WHO = ("harness", "mlflow")
BEGINS_AT_STEP = 50
LIMIT_S = 900


def log_by_mlflow(options: argparse.Namespace) -> None:
    """One run, logged as MLflow's documentation has it."""
    import mlflow

    sent = Sent(options.sent)
    begun_s = time.monotonic()
    mlflow.set_tracking_uri(options.uri)
    mlflow.set_experiment("mlflow")
    with mlflow.start_run():
        start_s = time.monotonic() - begun_s
        for step in range(1, options.steps + 1):
            values = metrics_at(step)
            sent.call(
                lambda values=values, step=step: mlflow.log_metrics(values, step=step, synchronous=False),  # type: ignore[misc]
                kind="metrics",
                step=step,
                values=values,
            )
            time.sleep(options.pace_s)
        logged_s = time.monotonic()
        mlflow.flush_async_logging()
    found = {"start_s": start_s, "longest_call_ms": 1000 * sent.longest_s, "end_s": time.monotonic() - logged_s}
    print(json.dumps({name: round(value, 2) for name, value in found.items()}))


def words_of(who: str, directory: Path, uri: str, steps: int, pace_s: float, is_offline: bool) -> list[str | Path]:
    """The command of one run."""
    sent: list[str | Path] = ["--sent", directory / "sent.jsonl", "--uri", uri]
    sent += ["--steps", str(steps), "--pace_s", str(pace_s)]
    if who == "mlflow":
        return [sys.executable, "-m", "tests.services.mlflow_async", "--log", *sent]
    only = ["--experiment", "harness", "--checkpoint_every", "100000", "--text_every", "100000"]
    offline = ["--offline"] if is_offline else []
    return [sys.executable, "-m", "tests.services.tracking_load", directory / "runs", *sent, *only, *offline]


@dataclass
class Place:
    """The setting of a fault: a server, a proxy before it, and two runs that log to it at the same time."""

    server: MlflowServer
    proxy: FaultyProxy
    processes: dict[str, subprocess.Popen[bytes]]
    outage_s: float


@dataclass(frozen=True)
class Case:
    """One fault.

    Args:
        happens: what goes wrong, for `Place.outage_s`.
        is_at_start: it is away before the two begin; ours is told so.
        small_disk: the server's store has a file system of its own.
    """

    happens: Callable[[Place], None]
    is_at_start: bool = False
    small_disk: bool = False

    def run(self, directory: Path, outage_s: float, pace_s: float) -> dict[str, Any]:
        """Start both runs, cause the fault, and wait for both ends; returns the results by logger."""
        directory.mkdir()
        steps = BEGINS_AT_STEP + round((outage_s + 10) / pace_s)
        with small_disk(directory / "disk") if self.small_disk else nullcontext(directory) as where:
            server = MlflowServer(where / "server")
            server.start()
            proxy = FaultyProxy("127.0.0.1", server.port)
            place = Place(server, proxy, {}, outage_s)
            try:
                if self.is_at_start:
                    proxy.refuse()
                for who in WHO:
                    (directory / who).mkdir()
                    words = words_of(who, directory / who, proxy.uri, steps, pace_s, self.is_at_start)
                    place.processes[who] = start(words, directory / who)
                if not self.is_at_start:
                    for who in WHO:
                        wait_for_step(BEGINS_AT_STEP, directory / who)
                self.happens(place)
                return {who: self._outcome(who, place, directory / who) for who in WHO}
            finally:
                for process in place.processes.values():
                    process.kill()
                    process.wait()
                proxy.close()
                server.stop()

    def _outcome(self, who: str, place: Place, directory: Path) -> dict[str, Any]:
        code = place.processes[who].wait(LIMIT_S)
        if who == "harness" and code:
            deliver_rest(directory / "runs/it", None)  # what its user does with a run that was killed, or was offline
        last = (directory / "output.txt").read_text().strip().splitlines()[-1:]
        times = json.loads(last[0]) if last and last[0].startswith("{") else {}
        reader = MlflowClient(place.server.uri)
        experiment = reader.get_experiment_by_name(who)
        runs = reader.search_runs([experiment.experiment_id]) if experiment is not None else []
        there = [point for run in runs for point in points(reader, run)]
        return {
            "exit_code": code,
            "status": [run.info.status for run in runs],
            "points": asdict(count_of(sent_points(read_sent(directory / "sent.jsonl")), there)),
            **{name: times.get(name) for name in ("start_s", "longest_call_ms", "end_s")},
        }


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def start(words: Sequence[str | Path], directory: Path) -> subprocess.Popen[bytes]:
    with (directory / "output.txt").open("wb") as stream:
        return subprocess.Popen(
            words, cwd=directory, env=environment(), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )


def wait_for_step(step: int, directory: Path) -> None:
    sent = directory / "sent.jsonl"
    deadline_s = time.monotonic() + 120
    while not (sent.exists() and f'"step": {step},' in sent.read_text()):
        if time.monotonic() > deadline_s:
            raise AssertionError((directory / "output.txt").read_text()[-3000:])
        time.sleep(0.05)


def away(place: Place) -> None:
    place.proxy.refuse()
    time.sleep(place.outage_s)
    place.proxy.accept()


def killed_and_restarted(place: Place) -> None:
    place.server.stop(signal.SIGKILL)
    time.sleep(place.outage_s)
    place.server.start()


def answers(*said: Fault) -> Callable[[Place], None]:
    def happen(place: Place) -> None:
        place.proxy.misbehave(*said)
        time.sleep(place.outage_s)
        place.proxy.behave()

    return happen


def locked(place: Place) -> None:
    store = sqlite3.connect(place.server.directory / "mlflow.db", isolation_level=None)
    store.execute("BEGIN EXCLUSIVE")
    time.sleep(place.outage_s)
    store.execute("ROLLBACK")
    store.close()


def full(place: Place) -> None:
    filler = place.server.directory / "filler"
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    time.sleep(place.outage_s)
    filler.unlink()


def trainers_killed(place: Place) -> None:
    """While the server is down, so that logged values exist only in the loggers."""
    place.proxy.refuse()
    time.sleep(place.outage_s / 6)
    for process in place.processes.values():
        process.kill()
    place.proxy.accept()


FAULTS = {
    "server away at the start": Case(away, is_at_start=True),
    "server away in the middle": Case(away),
    "server killed and started again": Case(killed_and_restarted),
    "500 to all": Case(answers(Fault("500", status=500))),
    "429 to all": Case(answers(Fault("429", status=429))),
    "504 to half, done all the same": Case(answers(Fault("504", status=504, is_forwarded=True, share=0.5))),
    "no answer": Case(answers(Fault("hangs", hangs=True))),
    "401 to all": Case(answers(Fault("401", status=401))),
    "database locked": Case(locked),
    "server's disk full": Case(full, small_disk=True),
    "trainer killed while the server is away": Case(trainers_killed),
}


def main() -> int:
    """Compare, or be one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outage_s", type=float, default=60.0)
    parser.add_argument("--pace_s", type=float, default=0.05, help="between two steps")
    parser.add_argument("--only", default="", help="faults whose name has this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--log", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sent", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.log:
        log_by_mlflow(options)
        return 0
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="harness-async-") as directory:
        for number, (name, case) in enumerate(FAULTS.items()):
            if options.only in name:
                found[name] = case.run(Path(directory, str(number)), options.outage_s, options.pace_s)
                sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    record = {"outage_s": options.outage_s, "pace_s": options.pace_s, "mlflow": version("mlflow"), "faults": found}
    print(json.dumps(record, indent=1) if options.json else "\n".join(table(found)))
    return 0


def table(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """As Markdown has it: of each fault, the points of ours and of MLflow's."""
    lines = ["| what happens | ours: sent | there | twice | lost | MLflow's: sent | there | twice | lost |"]
    lines.append("| --- " * 9 + "|")
    for name, both in found.items():
        cells = [f"{both[who]['points'][what]:,}" for who in WHO for what in ("sent", "there", "twice", "lost")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
