"""Kills trainer and publisher at random times, then compares what was sent with what MLflow has.

python -m tests.services.tracking_chaos --kills 100 --json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.tracking.publisher.sync import deliver_rest
from tests.launching import descendants, environment
from tests.services.counting import count, problems, table
from tests.services.mlflow_server import MlflowServer

VICTIMS = ("trainer", "publisher", "both")
LIMIT_S = 600


class Chaos:
    """One run with as many attempts as necessary.

    Args:
        directory: for server and run.
        num_kills: so many.
        seed: of the moments and the victims.
        num_steps: of the run.
    """

    def __init__(self, directory: Path, num_kills: int, seed: int, num_steps: int) -> None:
        self.directory = directory
        self.num_kills = num_kills
        self.num_steps = num_steps
        self.draw = random.Random(seed)
        self.killed: Counter[str] = Counter()
        self.num_attempts = 0
        self.run_dir = directory / "runs/it"
        self.sent = directory / "sent.jsonl"

    def run(self) -> dict[str, Any]:
        """Run the test and return its report."""
        server = MlflowServer(self.directory / "mlflow")
        server.start()
        begun_s = time.monotonic()
        try:
            trainer = self._start(server)
            while self.killed.total() < self.num_kills:
                # From the start of the interpreter to well into the training.
                time.sleep(self.draw.uniform(0.0, 9.0))
                if trainer.poll() is not None:
                    raise AssertionError(f"it was over before all were killed: {self._output()}")
                if self._kill(self.draw.choice(VICTIMS), trainer):
                    trainer = self._start(server)
            if trainer.wait(LIMIT_S):
                deliver_rest(self.run_dir, None)
            seconds = time.monotonic() - begun_s
            counts = count(server.uri, "chaos", self.sent, self.run_dir)
        finally:
            server.stop()
        return {
            "kills": dict(self.killed),
            "attempts": self.num_attempts,
            "seconds": round(seconds, 1),
            "counts": {kind: asdict(each) for kind, each in counts.items()},
            "table": table(counts),
            "problems": problems(counts),
        }

    def _start(self, server: MlflowServer) -> subprocess.Popen[bytes]:
        self.num_attempts += 1
        words: list[str | Path] = [sys.executable, "-m", "tests.services.tracking_load", self.directory / "runs"]
        words += ["--sent", self.sent, "--uri", server.uri, "--experiment", "chaos", "--steps", str(self.num_steps)]
        words += ["--checkpoint_every", "30", "--text_every", "40", "--checkpoint_bytes", "400000"]
        with (self.directory / "output.txt").open("ab") as output:
            return subprocess.Popen(
                words, cwd=self.directory, env=environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def _kill(self, victim: str, trainer: subprocess.Popen[bytes]) -> bool:
        """Kill; whether the trainer is to be started again."""
        publisher = _publisher_of(trainer.pid)
        if victim != "trainer" and publisher is None:
            victim = "trainer"  # it has not begun yet
        if victim != "publisher":
            trainer.kill()
            trainer.wait()
        if victim != "trainer" and publisher is not None:
            with suppress(ProcessLookupError):
                os.kill(publisher, signal.SIGKILL)
        self.killed[victim] += 1
        return victim != "publisher"

    def _output(self) -> str:
        return (self.directory / "output.txt").read_text()[-3000:]


def _publisher_of(trainer: int) -> int | None:
    """The one that this trainer has started, from its first moment on."""
    for pid in descendants(trainer)[1:]:
        with suppress(OSError):
            if b"harness.tracking.publisher.process" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
    return None


def main() -> int:
    """0 if nothing is lost and nothing is twice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="default: enough for the kills")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="harness-chaos-") as directory:
        steps = options.steps or 60 * options.kills + 200
        found = Chaos(Path(directory), options.kills, options.seed, steps).run()
    print(json.dumps(found, indent=1) if options.json else found["table"])
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
