"""One training that is killed again and again, against one that never was.

    python -m tests.distributed.chaos --kills 200 --json      the long form, by hand

Each attempt is two ranks, forked from one process that has imported everything. At a random moment, in the
start, in a step, in a save or in an evaluation, one rank or both get SIGKILL; a rank that is left ends by
itself. At the end there must be one MLflow run with each point once, and the weights of the training that was
never killed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.checkpoint.format.commit import list_checkpoints
from harness.checkpoint.format.verify import verify
from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
from harness.config.task import StepOutput
from harness.errors import HarnessError
from harness.training.app import train
from tests.distributed.saving_ranks import become_rank, free_port

NUM_RANKS = 2
NUM_EPOCHS = 5
# A rank that is left alone ends by itself within this.
ALONE_S = 45.0


class Augmented(Dataset[Any]):
    """Each sample comes with noise of its own, drawn where it is loaded."""

    def __len__(self) -> int:
        return 960

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = torch.full((8,), index / len(self)) + 0.05 * torch.randn(8)
        return inputs, inputs.sum(0, keepdim=True)


class Slow:
    """A task with random numbers everywhere, and a pause in each step."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Dropout(0.2), nn.Linear(64, 1))

    def train_data(self) -> DataLoader[Any]:
        return DataLoader(Augmented(), 8, shuffle=True)

    def eval_data(self) -> DataLoader[Any]:
        return DataLoader(Augmented(), 48)

    def step(self, model: nn.Module, batch: list[Tensor]) -> StepOutput:
        time.sleep(self.pause_s)
        inputs, targets = batch
        return StepOutput((model(inputs) - targets).square().mean(), len(inputs), {})


def train_on(rank: int, world_size: int, port: int, directory: Path, pause_s: float) -> None:
    """One rank of one attempt."""
    become_rank(rank, world_size, port)
    # What it says would drown what the test says.
    log = os.open(directory / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    config = RunConfig(
        task=ClassSpec("tests.distributed.chaos.Slow", {"pause_s": pause_s}),
        optimizer=ClassSpec("torch.optim.AdamW", {"lr": 0.01}),
        scheduler=ClassSpec("torch.optim.lr_scheduler.StepLR", {"step_size": 50, "gamma": 0.8}),
        run_dir=str(directory),
        run_name="run",
        trainer=TrainerConfig(max_epochs=NUM_EPOCHS, gradient_accumulation_steps=2, progress_bar=False),
        checkpoint=CheckpointConfig(every_n_epochs=1, every_n_steps=7, when_busy="wait"),
        tracking=TrackingConfig(
            tracking_uri=f"sqlite:///{directory}/mlflow.db", log_every_n_steps=3, log_models=False, start_timeout_s=60
        ),
    )
    try:
        train(config)
    except HarnessError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)


@dataclass
class Chaos:
    """What came of it."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    num_attempts: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def attempt(context: Any, directory: Path, pause_s: float) -> list[BaseProcess]:
    port = free_port()
    processes: list[BaseProcess] = [
        context.Process(target=train_on, args=(rank, NUM_RANKS, port, directory, pause_s)) for rank in range(NUM_RANKS)
    ]
    for process in processes:
        process.start()
    return processes


def run_to_the_end(context: Any, directory: Path, pause_s: float, timeout_s: float = 300.0) -> None:
    processes = attempt(context, directory, pause_s)
    deadline_s = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    log = (directory / "rank-0.log").read_text()[-2000:]
    assert codes == [0] * NUM_RANKS, f"ended with {codes}: {log}"


def chaos(context: Any, directory: Path, num_kills: int, seed: int, pause_s: float, longest_s: float) -> Chaos:
    """Kill `num_kills` times, each attempt after up to `longest_s` seconds, and let it end; then compare."""
    draw = random.Random(seed)
    found = Chaos()
    begun_s = time.monotonic()
    whole, cut = directory / "whole", directory / "cut"
    whole.mkdir()
    cut.mkdir()
    run_to_the_end(context, whole, 0.0)
    while sum(found.kills.values()) < num_kills:
        processes = attempt(context, cut, pause_s)
        found.num_attempts += 1
        num_met = times_met(cut)
        time.sleep(draw.uniform(0.0, longest_s))
        victims = draw.choice([[0], [1], [0, 1]])
        hit = [rank for rank in victims if processes[rank].is_alive()]
        for rank in hit:
            pid = processes[rank].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        if hit:
            found.kills[" and ".join(f"rank {rank}" for rank in hit)] += 1
        # Before the ranks have met it is the launcher's to end those that wait for the others.
        have_met = times_met(cut) > num_met
        for rank, process in enumerate(processes):
            process.join(ALONE_S if have_met or not hit else 0.0)
            if process.is_alive():
                if have_met:
                    found.problems.append(f"rank {rank} was left alone and did not end within {ALONE_S:.0f} s")
                process.kill()
                process.join()
        if not hit and all(process.exitcode == 0 for process in processes):
            found.problems.append(f"the training came to its end after {sum(found.kills.values())} kills")
            break
        found.problems += damaged(cut / "run" / "checkpoints")
    run_to_the_end(context, cut, 0.0)
    found.num_attempts += 1
    found.problems += differences(whole, cut)
    found.seconds = time.monotonic() - begun_s
    return found


def times_met(directory: Path) -> int:
    """How often the ranks have come to open the run."""
    log = directory / "rank-0.log"
    return log.read_text().count("\nrun run in ") + log.read_text().startswith("run run in ") if log.exists() else 0


def damaged(checkpoints: Path) -> list[str]:
    """Whatever is wrong with the newest of them: the others have been looked at before."""
    if not checkpoints.exists() or not (listed := list_checkpoints(checkpoints)):
        return []
    return verify(checkpoints / listed[-1][0]).problems


def differences(whole: Path, cut: Path) -> list[str]:
    """What the run that was killed has otherwise than the one that was not."""
    problems = []
    (*_, (expected_name, _)), (*_, (name, _)) = (
        list_checkpoints(path / "run" / "checkpoints") for path in (whole, cut)
    )
    if name != expected_name:
        problems.append(f"the last checkpoint is {name} and not {expected_name}")
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected, mine = (load_file(path / "run" / "checkpoints" / expected_name / file) for path in (whole, cut))
        if expected.keys() != mine.keys():
            problems.append(f"{file} has other names")
        problems += [f"{file}: {key} differs" for key in expected if not torch.equal(expected[key], mine.get(key))]
    problems += other_states(whole / "run" / "checkpoints", cut / "run" / "checkpoints")
    expected_points, points = points_in_mlflow(whole), points_in_mlflow(cut)
    for metric in sorted(expected_points.keys() | points.keys()):
        if not metric.startswith(("train/", "eval/", "epoch")):
            continue
        if twice := [step for step, count in collections.Counter(s for s, _ in points[metric]).items() if count > 1]:
            problems.append(f"{metric}: is there twice at {twice[:5]}")
        if sorted(points[metric]) != sorted(expected_points[metric]):
            other = sorted(set(points[metric]) ^ set(expected_points[metric]))
            problems.append(f"{metric}: differs at {other[:5]}")
    return problems


def other_states(whole: Path, cut: Path) -> list[str]:
    """Checkpoints that both runs have, with another random state, place in the data or sum of a metric on some rank."""
    found = []
    names = [{name for name, _ in list_checkpoints(checkpoints)} for checkpoints in (whole, cut)]
    for name in sorted(set.intersection(*names)):
        ranks = [json.loads((path / name / "trainer_state.json").read_text())["ranks"] for path in (whole, cut)]
        for rank, (expected, mine) in enumerate(zip(*ranks, strict=True)):
            found += [f"{name}: {part} of rank {rank} differs" for part in expected if expected[part] != mine[part]]
    return found


def points_in_mlflow(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Each metric's (step, value) points, of the one run that there is."""
    from mlflow import MlflowClient

    reader = MlflowClient(f"sqlite:///{directory}/mlflow.db")
    runs = reader.search_runs([each.experiment_id for each in reader.search_experiments()])
    assert len(runs) == 1, f"{len(runs)} MLflow runs"
    assert runs[0].info.status == "FINISHED", runs[0].info.status
    found: dict[str, list[tuple[int, float]]] = collections.defaultdict(list)
    for metric in runs[0].data.metrics:
        found[metric] = [(point.step, point.value) for point in reader.get_metric_history(runs[0].info.run_id, metric)]
    return found


def main() -> int:
    """The long form."""
    from tests.distributed.test_saver import CONTEXT

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause_s", type=float, default=0.1, help="of each step: longer where there are more kills")
    parser.add_argument("--longest_s", type=float, default=8.0, help="an attempt is killed after at most so long")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = chaos(CONTEXT, Path(directory), options.kills, options.seed, options.pause_s, options.longest_s)
    record = {
        "kills": dict(found.kills),
        "attempts": found.num_attempts,
        "seconds": round(found.seconds),
        "problems": found.problems,
        "seed": options.seed,
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
