"""MLflow's own asynchronous logging and ours, through the same faults: what was sent, and what MLflow has.

    python -m tests.services.mlflow_async --outage_s 60 --json

The same points at the same pace (`tracking_load`), to a real server behind the same proxy; MLflow as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from harness.tracking.sync import deliver_rest
from tests.launching import environment
from tests.services.counting import Count, count_of, points, read_sent, sent_points
from tests.services.faulty_proxy import Fault, FaultyProxy
from tests.services.mlflow_server import MlflowServer
from tests.services.tracking_load import Sent, metrics_at

EXPERIMENT = "faults"
BEGINS_AT_STEP = 50
LIMIT_S = 900


def log_by_mlflow(options: argparse.Namespace) -> None:
    """One run, logged as MLflow's documentation has it."""
    import mlflow

    sent = Sent(options.sent)
    mlflow.set_tracking_uri(options.uri)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run():
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
    print(json.dumps({"longest_call_ms": 1000 * sent.longest_s, "end_s": time.monotonic() - logged_s}))


def words_of(who: str, directory: Path, uri: str, steps: int) -> list[str | Path]:
    """The command of one run."""
    sent: list[str | Path] = ["--sent", directory / "sent.jsonl", "--uri", uri, "--steps", str(steps)]
    if who == "mlflow":
        return [sys.executable, "-m", "tests.services.mlflow_async", "--log", *sent]
    only = ["--experiment", EXPERIMENT, "--checkpoint_every", "100000", "--text_every", "100000"]
    return [sys.executable, "-m", "tests.services.tracking_load", directory / "runs", *sent, *only]


class Case:
    """One of the two, through one fault."""

    def __init__(self, who: str, directory: Path, steps: int) -> None:
        self.who = who
        self.directory = directory
        directory.mkdir(parents=True)
        self.server = MlflowServer(directory / "mlflow")
        self.server.start()
        self.proxy = FaultyProxy("127.0.0.1", self.server.port)
        self.steps = steps

    def run(self, fault: Callable[[FaultyProxy, subprocess.Popen[bytes]], None]) -> dict[str, Any]:
        """Start it, let `fault` happen, wait for its end; what came of it."""
        output = self.directory / "output.txt"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                words_of(self.who, self.directory, self.proxy.uri, self.steps),
                cwd=self.directory,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )
        try:
            self._wait_for_step(BEGINS_AT_STEP)
            fault(self.proxy, process)
            code = process.wait(LIMIT_S)
            if self.who == "harness" and code:
                # What its user does with a run that was killed.
                time.sleep(5.0)
                deliver_rest(self.directory / "runs/it", None)
            counted = self._count()
        finally:
            process.kill()
            process.wait()
            self.proxy.close()
            self.server.stop()
        last = output.read_text().strip().splitlines()[-1:]
        times = json.loads(last[0]) if last and last[0].startswith("{") else {}
        return {
            "exit_code": code,
            "points": asdict(counted),
            "longest_call_ms": times.get("longest_call_ms"),
            "end_s": times.get("end_s"),
        }

    def _wait_for_step(self, step: int) -> None:
        sent = self.directory / "sent.jsonl"
        deadline_s = time.monotonic() + 120
        while not (sent.exists() and f'"step": {step},' in sent.read_text()):
            if time.monotonic() > deadline_s:
                raise AssertionError((self.directory / "output.txt").read_text()[-3000:])
            time.sleep(0.05)

    def _count(self) -> Count:
        reader = MlflowClient(self.server.uri)
        experiment = reader.get_experiment_by_name(EXPERIMENT)
        (run,) = reader.search_runs([experiment.experiment_id])
        return count_of(sent_points(read_sent(self.directory / "sent.jsonl")), points(reader, run))


def faults(outage_s: float) -> dict[str, Callable[[FaultyProxy, subprocess.Popen[bytes]], None]]:
    """Name -> what happens."""

    def away(proxy: FaultyProxy, process: subprocess.Popen[bytes]) -> None:
        proxy.refuse()
        time.sleep(outage_s)
        proxy.accept()

    def answers(*said: Fault) -> Callable[[FaultyProxy, subprocess.Popen[bytes]], None]:
        def happen(proxy: FaultyProxy, process: subprocess.Popen[bytes]) -> None:
            proxy.misbehave(*said)
            time.sleep(outage_s)
            proxy.behave()

        return happen

    def killed(proxy: FaultyProxy, process: subprocess.Popen[bytes]) -> None:
        os.kill(process.pid, signal.SIGKILL)

    return {
        f"server away for {outage_s:.0f} s": away,
        f"half of all answers 500 for {outage_s:.0f} s": answers(Fault("500", status=500, share=0.5)),
        f"half of all answers 504, done all the same, for {outage_s:.0f} s": answers(
            Fault("504", status=504, is_forwarded=True, share=0.5)
        ),
        f"401 for {outage_s:.0f} s": answers(Fault("401", status=401)),
        "trainer killed": killed,
    }


def main() -> int:
    """Compare, or be one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--outage_s", type=float, default=60.0)
    parser.add_argument("--only", default="", help="faults whose name has this")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--log", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sent", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--pace_s", type=float, default=0.02, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.log:
        log_by_mlflow(options)
        return 0
    found: dict[str, dict[str, Any]] = {}
    steps = options.steps or int(options.outage_s / 0.02) + 500
    with tempfile.TemporaryDirectory(prefix="harness-async-") as directory:
        for number, (name, fault) in enumerate(faults(options.outage_s).items()):
            if options.only in name:
                found[name] = {
                    who: Case(who, Path(directory, f"{number}-{who}"), steps).run(fault)
                    for who in ("harness", "mlflow")
                }
                sys.stderr.write(f"{name}: {json.dumps(found[name])}\n")
    print(json.dumps(found, indent=1) if options.json else "\n".join(table(found)))
    return 0


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """For a terminal."""
    lines = [f"{'':60}{'':10}{'sent':>8}{'there':>8}{'twice':>8}{'lost':>8}"]
    for name, both in found.items():
        for who, result in both.items():
            c = result["points"]
            lines.append(f"{name:60}{who:10}{c['sent']:8}{c['there']:8}{c['twice']:8}{c['lost']:8}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
