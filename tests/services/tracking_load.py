"""A run without training: it logs values that depend only on the step, at a given pace.

    python -m tests.services.tracking_load RUNS_DIR --uri http://127.0.0.1:5000 --steps 200 --sent SENT

A restarted run resumes from its last checkpoint, like a training. SENT records each accepted value as one JSON
line, written when the tracker's call has returned. The last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save_file

from harness.checkpoint.format.commit import FileRecord, Manifest, commit, list_checkpoints, temporary_of
from harness.checkpoint.format.digest import digest_of
from harness.checkpoint.format.ranges import Range, Ranges
from harness.config.schema import TrackingConfig
from harness.errors import TrackingError
from harness.run.directory import make_run_directory
from harness.tracking.tracker import Tracker

NUM_METRICS = 20
NUM_PARAMS = 30
EXIT_UNDELIVERED = 3
_Result = TypeVar("_Result")


def metrics_at(step: int) -> dict[str, float]:
    """The metrics of a step, the same in each attempt. One is infinite once, and one is no number."""
    draw = random.Random(step)
    values = {f"train/metric_{index:02}": draw.uniform(-1, 1) * 10 ** draw.randint(-9, 9) for index in range(20)}
    if step == 7:
        values["train/metric_00"] = math.nan
    return values


def params() -> dict[str, str]:
    """Return the parameters, one of them with MLflow's maximum length."""
    return {f"param.{index}": str(index) for index in range(NUM_PARAMS - 1)} | {"param.long": "x" * 6000}


def text_at(step: int) -> str:
    """The text of a step."""
    return f"this is step {step}\n" * 50


def write_checkpoint(run_dir: Path, step: int, size_bytes: int, metrics: dict[str, float]) -> tuple[str, Manifest]:
    """A committed checkpoint of real files."""
    name = f"step-{step:08}"
    final = run_dir / "checkpoints" / name
    temporary = temporary_of(final, f"{os.getpid()}")
    temporary.mkdir(parents=True)
    values = np.random.default_rng(step).integers(0, 255, size_bytes, dtype=np.uint8)
    half = len(values) // 2
    save_file({"one": values[:half], "other": values[half:]}, temporary / "model.safetensors")
    (temporary / "trainer_state.json").write_text(json.dumps({"step": step}))
    records = [_record(temporary / file) for file in ("model.safetensors", "trainer_state.json")]
    key = f"{run_dir.name}-{name}-{os.urandom(8).hex()}"
    manifest = Manifest(key, 0, step, _now_ms(), metrics, tuple(records), {"strategy": "none", "world_size": 1}, {})
    commit(temporary, final, manifest)
    return name, manifest


def _record(path: Path) -> FileRecord:
    content = path.read_bytes()
    return FileRecord(path.name, len(content), Ranges.of([Range(0, len(content), 0, digest_of(content))]))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Sent:
    """Records on disk what the tracker has accepted, and the longest duration of a call."""

    path: Path
    longest_s: float = 0.0

    def __post_init__(self) -> None:
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def call(self, action: Callable[[], _Result], **record: Any) -> _Result:
        """Call the tracker, and record that the call has returned."""
        begun_s = time.perf_counter()
        result = action()
        self.longest_s = max(self.longest_s, time.perf_counter() - begun_s)
        os.write(self._file, json.dumps(record).encode() + b"\n")
        return result


class Load:
    """One attempt at the run.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        directory, self._lock = make_run_directory(options.runs_dir, options.name, None, "auto")
        self.run_dir, self.attempt = directory.path, directory.attempt
        more = {"offline": True} if options.offline else {}
        config = TrackingConfig(
            tracking_uri=options.uri,
            experiment_name=options.experiment,
            start_timeout_s=options.start_timeout_s,
            drain_timeout_s=options.drain_timeout_s,
            **more,
        )
        self.tracker = Tracker(self.run_dir, config, self.attempt)
        self.sent = Sent(options.sent)

    def run(self) -> dict[str, Any]:
        """Start, log and finish; returns the result."""
        tracker, sent, options = self.tracker, self.sent, self.options
        begun_s = time.monotonic()
        tracker.start(options.name, {"world_size": "1"})
        started_s = time.monotonic()
        sent.call(lambda: tracker.log_params(params()), kind="params", values=params())
        step = self._resume()
        while step < options.steps:
            step += 1
            self._step(step)
            # The pace of a training; nothing waits for it.
            time.sleep(options.pace_s)
        logged_s = time.monotonic()
        delivered = tracker.finish("FINISHED", "all is logged", options.drain_timeout_s, lambda share: True)
        return {
            "run_id": tracker.run_id,
            "attempt": self.attempt,
            "delivered": delivered,
            "start_s": round(started_s - begun_s, 2),
            "log_s": round(logged_s - started_s, 2),
            "end_s": round(time.monotonic() - logged_s, 2),
            "longest_call_ms": round(1000 * sent.longest_s, 2),
        }

    def _step(self, step: int) -> None:
        tracker, sent, options = self.tracker, self.sent, self.options
        values = metrics_at(step)
        points = sent.call(lambda: tracker.log_metrics(values, step), kind="metrics", step=step, values=values)
        if step % options.tag_every == 0:
            tags = {f"load.step.{step}": f"reached {step}", "load.last": str(step)}
            sent.call(lambda: tracker.set_tags(tags), kind="tags", values=tags)
        if step % options.text_every == 0:
            name, content = f"texts/{step}.txt", text_at(step)
            sent.call(lambda: tracker.log_text(name, content), kind="text", name=name, content=content)
        if step % options.checkpoint_every == 0:
            name, manifest = write_checkpoint(self.run_dir, step, options.checkpoint_bytes, values)
            self._publish(name, manifest, [[key, *point] for key, point in points.items()])

    def _resume(self) -> int:
        """Return the step to resume from, after logging the checkpoints that a killed attempt has not logged."""
        if self.attempt == 1:
            return 0
        found = list_checkpoints(self.run_dir / "checkpoints")
        for name, manifest in found:
            if not self.tracker.has_checkpoint(manifest.key):
                points = self.tracker.points_at(manifest.metrics, manifest.step)
                self._publish(name, manifest, [[key, *point] for key, point in points.items()])
        name, step = (found[-1][0], found[-1][1].step) if found else (None, 0)
        self.tracker.resume_from(step, name)
        return step

    def _publish(self, name: str, manifest: Manifest, points: list[list[Any]]) -> None:
        files = [file.name for file in manifest.files] + ["manifest.json"]
        record = {
            "name": name,
            "key": manifest.key,
            "epoch": manifest.epoch,
            "step": manifest.step,
            "files": files,
            "resume_files": ["trainer_state.json"],
            "log_resume_state": "all",
            "metrics": points,
            "monitored": None,
            "time_ms": manifest.time_ms,
            "size_bytes": manifest.size_bytes,
        }
        self.sent.call(lambda: self.tracker.log_checkpoint(record), kind="checkpoint", key=manifest.key, name=name)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--uri", default=None, help="default: MLFLOW_TRACKING_URI")
    parser.add_argument("--name", default="it")
    parser.add_argument("--experiment", default="load")
    parser.add_argument("--sent", type=Path, required=True, help="file that records what the tracker has accepted")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pace_s", type=float, default=0.02)
    parser.add_argument("--tag_every", type=int, default=25)
    parser.add_argument("--text_every", type=int, default=50)
    parser.add_argument("--checkpoint_every", type=int, default=70)
    parser.add_argument("--checkpoint_bytes", type=int, default=3_000_000)
    parser.add_argument("--start_timeout_s", type=float, default=60.0)
    parser.add_argument("--drain_timeout_s", type=float, default=60.0)
    parser.add_argument("--offline", action="store_true", help="no server is needed at the start")
    return parser


def main() -> int:
    """One attempt; 0 if all is delivered."""
    try:
        found = Load(arguments().parse_args()).run()
    except TrackingError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if found["delivered"] else EXIT_UNDELIVERED


if __name__ == "__main__":
    sys.exit(main())
