"""What autologging and trackers store in MLflow, ours beside others: the data of the table in docs/comparison.md.

    python benchmarks/compare_autolog.py                                         all cells: half an hour
    python benchmarks/compare_autolog.py --only harness_autolog,fsdp2            those of one peer, or of one situation
    python benchmarks/compare_autolog.py --json --into benchmarks/results/compare_autolog.json    update the file

Each cell is a peer in a situation. Its script (`benchmarks/peers`) runs to the end, or to a time limit at which the
stacks of all its processes are recorded. Then the contents of MLflow are read.

    alone                    trains for three epochs; also logs values that are not finite
    ddp, fsdp2, zero2        trains on two ranks with uneven batches
    loop, batches, default,  MLflow's autologging: with a loop of one's own, and with other frequencies of saving; in
    fsdp2_ and zero2_default the other cells it saves each epoch
    raise, exit, sigterm,    fails in its second epoch; if it was killed it is run again, and resumes by the peer's own
    sigint, sigkill          means
    slow                     each uploaded file takes `SLOW_S` longer
    away, away_longer        the server is killed during training and restarted, with MLflow's default retries, and with
                             so few that they end before the restart
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"

import mlflow  # noqa: E402
from mlflow import MlflowClient  # noqa: E402

from benchmarks.peers import task  # noqa: E402
from benchmarks.peers.in_mlflow import ended_runs, facts_of  # noqa: E402
from tests.launching import accelerate, harness, run  # noqa: E402
from tests.services.mlflow_server import MlflowServer, make_database  # noqa: E402
from tests.services.proxy import Proxy  # noqa: E402

PEERS = ("mlflow_autolog", "accelerate_tracker", "lightning_logger", "hf_callback", "harness_autolog")
SLOW_S = 2.0


@dataclass(frozen=True)
class Situation:
    """Options of a script, and the faults of its run.

    Args:
        words: options of the peers' scripts.
        strategy: single, or what two ranks do.
        peers: that it is for.
        is_run_again: after it has failed.
        needs_server: MLflow is a server, not a database.
        slow_s: how much longer each uploaded file takes.
        away_s: how long the server is away, once half of the steps are done.
        variables: of the environment.
    """

    words: tuple[str, ...] = ()
    strategy: str = "single"
    peers: tuple[str, ...] = PEERS
    is_run_again: bool = False
    slow_s: float = 0.0
    away_s: float = 0.0
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def needs_server(self) -> bool:
        return self.slow_s > 0 or self.away_s > 0


def failing(how: str, **more: Any) -> Situation:
    # Slow enough for what is written beside the steps to be there.
    return Situation(words=("--fails", how, "--fails_at", "13", "--pace_s", "0.2"), **more)


PACED = ("--epochs", "3", "--steps", "30", "--pace_s", "0.3")
OF_MLFLOW = ("mlflow_autolog",)
SITUATIONS = {
    "alone": Situation(words=("--odd_values",)),
    "loop": Situation(words=("--loop", "own"), peers=OF_MLFLOW),
    "batches": Situation(words=("--save_freq", "5"), peers=OF_MLFLOW),
    "default": Situation(words=("--save_freq", "default"), peers=OF_MLFLOW),
    "fsdp2_default": Situation(words=("--save_freq", "default"), strategy="fsdp2", peers=OF_MLFLOW),
    "zero2_default": Situation(words=("--save_freq", "default"), strategy="zero2", peers=OF_MLFLOW),
    "ddp": Situation(strategy="ddp"),
    "fsdp2": Situation(strategy="fsdp2"),
    "zero2": Situation(strategy="zero2"),
    "raise": failing("raise"),
    "exit": failing("exit"),
    "sigterm": failing("sigterm"),
    "sigint": failing("sigint"),
    "sigkill": failing("sigkill", is_run_again=True),
    "slow": Situation(words=PACED, slow_s=SLOW_S),
    "away": Situation(words=PACED, away_s=20.0),
    "away_longer": Situation(words=PACED, away_s=30.0, variables={"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}),
}


def command(peer: str, situation: Situation) -> list[str | Path]:
    """Return the command of the peer's script."""
    scripts = ROOT / "benchmarks" / "peers"
    words = ["--peer", peer, "--strategy", situation.strategy, *situation.words]
    ranks = ["--num_processes", "2"]
    if peer == "harness_autolog":
        own = ["--every_n_epochs", "1", "--log_every_n_steps", "1", "--run_name", "it", "--resume", "auto"]
        own += [] if situation.strategy == "single" else ["--strategy", situation.strategy, *ranks]
        return harness("run", *own, scripts / "accelerate_loop.py", *words)
    if peer in ("lightning_logger", "mlflow_autolog") and "--loop" not in words:
        return [sys.executable, scripts / "lightning_fit.py", *words]  # it starts the other rank itself
    name = "transformers_trainer.py" if peer == "hf_callback" else "accelerate_loop.py"
    if situation.strategy == "single":
        return [sys.executable, scripts / name, *words]
    # The Trainer takes DeepSpeed's configuration from its own arguments.
    is_hf_zero = situation.strategy == "zero2" and peer == "hf_callback"
    return accelerate("ddp" if is_hf_zero else situation.strategy, *ranks, scripts / name, *words)


# -------------------------------------------------------------------------------------- one cell


def measure(peer: str, situation: Situation, limit_s: float, cwd: Path) -> dict[str, Any]:
    """Measure one cell."""
    with ExitStack() as stack:
        uri, outage = stack.enter_context(store(situation, cwd))
        variables = {
            "MLFLOW_TRACKING_URI": uri,
            "MLFLOW_EXPERIMENT_NAME": "compare",
            "COMPARE_LIGHTNING": "pytorch_lightning" if peer == "mlflow_autolog" else "lightning.pytorch",
            **situation.variables,
        }
        begun_s = time.time()
        found = attempt(command(peer, situation), cwd, limit_s, variables, outage)
        if away := (cwd / "away.json").exists() and json.loads((cwd / "away.json").read_text()):
            found["away_s"] = [round(when_s - begun_s, 1) for when_s in away]
        if situation.is_run_again:
            found["statuses_before"] = [each.info.status for each in ended_runs(MlflowClient(uri))]
            calm = Situation(strategy=situation.strategy)
            found |= {
                f"{key}_again": value for key, value in attempt(command(peer, calm), cwd, limit_s, variables).items()
            }
        mlflow.set_tracking_uri(uri)
        client = MlflowClient(uri)
        found["runs"] = [facts_of(client, each, cwd) for each in ended_runs(client)]
    return found


def attempt(
    words: list[str | Path],
    cwd: Path,
    limit_s: float,
    variables: dict[str, str],
    outage: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Run the script once: exit, longest pause between steps, and duration of its end."""
    before = len(notes(cwd))
    found: dict[str, Any] = {"exit_code": None}
    thread = threading.Thread(target=outage or (lambda: None))
    thread.start()
    try:
        found["exit_code"] = run(words, cwd, timeout_s=limit_s, extra=variables).code
    except AssertionError as error:
        found["stacks"] = frames(str(error))
    ended_s = time.time()
    thread.join()
    lines = notes(cwd)[before:]
    times = [line["time_s"] for line in lines if "odd" not in line]
    if times:
        gaps = [later - sooner for sooner, later in pairwise(times[1:])]
        found["steps"] = len(times) - 1
        found["longest_step_s"] = round(max(gaps, default=0.0), 2)
        found["stood_s"] = round(sum(gaps) - len(gaps) * statistics.median(gaps), 2) if gaps else 0.0
        found["end_s"] = round(ended_s - times[-1], 2)
    if raised := {line["odd"]: line["raised"] for line in lines if "odd" in line}:
        found["raised"] = raised
    output = (cwd / "output.txt").read_text()
    if warned := [name for name in task.ODD_VALUES if f"odd_{name}" in output]:
        found["warned"] = warned
    found["errors"] = errors(output)
    return found


def notes(cwd: Path, rank: int = 0) -> list[dict[str, Any]]:
    path = cwd / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def errors(output: str) -> list[str]:
    """Return the last line of the last traceback that is not the launcher's; else MLflow's error message."""
    lines = [re.sub(r"^\[rank\d\]: |^.* WARNING mlflow.utils.autologging_utils: ", "", x) for x in output.splitlines()]
    found = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|Encountered unexpected", line)]
    return list(dict.fromkeys(line[:200] for line in found if "ChildFailedError" not in line))[-1:]


def frames(text: str) -> list[str]:
    """Return the main thread's frames of each process, innermost first, from py-spy's output."""
    stacks = re.findall(r'"MainThread"\n((?:    .*\n?)+)', text)
    lines = [[line.strip() for line in stack.splitlines() if "wrapper" not in line] for stack in stacks]
    return [" < ".join(each[:6]) for each in lines]


@contextmanager
def store(situation: Situation, cwd: Path) -> Iterator[tuple[str, Callable[[], None] | None]]:
    """The MLflow server, and its faults during a run."""
    if not situation.needs_server:
        yield make_database(cwd / "mlflow.db"), None
        return
    server = MlflowServer(cwd / "server")
    server.start()
    proxy = Proxy(server.port)
    if situation.slow_s:
        proxy.delay_s = lambda method, path: situation.slow_s if method == "PUT" else 0.0

    def outage() -> None:
        deadline_s = time.monotonic() + 120
        while len(notes(cwd)) < 46 and time.monotonic() < deadline_s:
            time.sleep(0.1)  # the script's own notes are the only sign of where it is
        stopped_s = time.time()
        server.stop()
        time.sleep(situation.away_s)
        server.start()
        (cwd / "away.json").write_text(json.dumps([stopped_s, time.time()]))

    try:
        # An outage is a server that does not answer, and not a proxy that says so.
        yield (proxy.uri, None) if situation.slow_s else (server.uri, outage)
    finally:
        proxy.close()
        server.stop()


# ------------------------------------------------------------------------------------------ main


def show(cells: dict[str, dict[str, Any]]) -> None:
    """Print a few lines for each cell."""
    for name, cell in cells.items():
        head = {key: value for key, value in cell.items() if key not in ("runs",)}
        print(f"{name}: {json.dumps(head)}")
        for each in cell["runs"]:
            print(f"    {each['status']} {each['reason'] or ''}")
            for key, found in each["losses"].items():
                print(f"        {key}: {found['points']} points at {found['at_steps']} steps: {found['is']}")
            for key, found in {**each["models"], **each["artifacts"]}.items():
                print(f"        {key}: {found.get('weights') or found.get('error') or found['kinds']}")
            if each["odd_values"]:
                print(f"        {each['odd_values']}")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="what autologging and trackers leave in MLflow")
    parser.add_argument("--only", default="", help="peers, situations, or both, of those that `--help` names above")
    parser.add_argument("--limit_s", type=float, default=240.0, help="of one start of a script")
    parser.add_argument("--into", type=Path, help="a JSON file to put the cells into, beside those that are there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(words)
    wanted = set(filter(None, arguments.only.split(",")))
    if unknown := wanted - {*PEERS, *SITUATIONS}:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join([*PEERS, *SITUATIONS])}")
    peers = [peer for peer in PEERS if peer in wanted or not wanted & {*PEERS}]
    situations = [name for name in SITUATIONS if name in wanted or not wanted & {*SITUATIONS}]
    cells = {}
    for name in situations:
        for peer in peers:
            if peer not in SITUATIONS[name].peers:
                continue
            with tempfile.TemporaryDirectory(prefix="harness-compare-", dir=os.environ.get("TMPDIR")) as directory:
                cells[f"{peer}, {name}"] = measure(peer, SITUATIONS[name], arguments.limit_s, Path(directory))
    record = {
        "benchmark": "compare_autolog",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("mlflow", "accelerate", "lightning", "transformers", "torch")},
        "cells": cells,
    }
    if arguments.into:
        earlier = json.loads(arguments.into.read_text())["cells"] if arguments.into.exists() else {}
        text = json.dumps({**record, "cells": dict(sorted({**earlier, **cells}.items()))}, indent=1)
        arguments.into.write_text(text + "\n")
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        show(cells)


if __name__ == "__main__":
    main()
