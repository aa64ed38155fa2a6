"""Starting real runs from tests: in a directory of their own, ended by process id, with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
_DUMP_WAIT_S = 3.0


@dataclass(frozen=True)
class Done:
    """How a run ended: exit code, standard output and error together, seconds it took."""

    code: int
    output: str
    seconds: float

    @property
    def error_lines(self) -> list[str]:
        """The lines in which harness itself says why it ended."""
        return error_lines(self.output)


def error_lines(output: str) -> list[str]:
    """Those in which harness itself says why it ended."""
    return [line for line in output.splitlines() if line.startswith(("harness: error", "harness: stopped by"))]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a run: one thread for each rank, the tests' modules importable, nothing of the user's."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "ACCELERATE_", "HARNESS_"))
    }
    kept |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    }
    return kept | dict(extra or {})


@contextmanager
def started(
    words: Sequence[str | Path], cwd: Path, extra: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process in a session of its own, output in `cwd`/output.txt; whatever is left of it is ended."""
    with (cwd / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [str(word) for word in words],
            cwd=cwd,
            env=environment(extra),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
    try:
        yield process
    finally:
        _end_group(process)


def run(
    words: Sequence[str | Path], cwd: Path, *, timeout_s: float = 120, extra: Mapping[str, str] | None = None
) -> Done:
    """Run to the end. Past the time limit the stacks of all its Python processes are in the failure."""
    begun_s = time.monotonic()
    with started(words, cwd, extra) as process:
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            where = stacks(process.pid)
            raise AssertionError(
                f"not done after {timeout_s} s: {' '.join(map(str, words))}\n"
                f"{(cwd / 'output.txt').read_text()[-4000:]}\n{where}"
            ) from None
    return Done(code, (cwd / "output.txt").read_text(), time.monotonic() - begun_s)


def harness(*words: str | Path) -> list[str | Path]:
    """The `harness` command line."""
    return [BIN / "harness", *words]


def accelerate(strategy: str, *words: str | Path) -> list[str | Path]:
    """`accelerate launch` with one of our own configuration files."""
    config = ROOT / "configs" / "accelerate" / f"{strategy}.yaml"
    return [BIN / "accelerate", "launch", "--config_file", config, "--main_process_port", "0", *words]


def fsdp1_config(directory: Path, **changes: str) -> Path:
    """A configuration file of accelerate's as its users have it who never chose a version of FSDP: the first one."""
    text = (ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text()
    changes = {"fsdp_reshard_after_forward": "FULL_SHARD"} | changes
    left_out = {"fsdp_version", "fsdp_cpu_ram_efficient_loading", *changes}
    lines = [line for line in text.splitlines() if line.partition(":")[0].strip() not in left_out]
    path = directory / "fsdp1.yaml"
    path.write_text("\n".join([*lines, *(f"  {name}: {value}" for name, value in changes.items())]))
    return path


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, itself included."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def stacks(pid: int) -> str:
    """The Python stacks of every process of a run, by py-spy."""
    texts = []
    for member in descendants(pid):
        dump = subprocess.run(
            [BIN / "py-spy", "dump", "--pid", str(member)], capture_output=True, text=True, check=False
        )
        texts.append(dump.stdout or f"process {member}: {dump.stderr.strip()}")
    return "\n".join(texts)


def _end_group(process: subprocess.Popen[str]) -> None:
    members = descendants(process.pid)
    if process.poll() is None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(_DUMP_WAIT_S)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
    for member in members[1:]:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue
