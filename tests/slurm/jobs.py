"""Jobs of the tests: digits, submitted as a user does, and what MLflow and their log say of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities import Run

from tests.launching import BIN, ROOT
from tests.mlflow_reader import client, history, only_run
from tests.slurm.cluster import Cluster

# Never done by themselves: what ends them is what a test is about.
ENDLESS = ("--trainer.max_epochs", "1000000", "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "2")
_OPTIONS = (
    *("--trainer.progress_bar", "false", "--trainer.limit_train_batches", "8", "--tracking.log_every_n_steps", "1"),
)


@dataclass(frozen=True)
class Job:
    """A job that was submitted from `cwd`."""

    cluster: Cluster
    cwd: Path
    id: str
    name: str

    @property
    def run_dir(self) -> Path:
        return self.cwd / "runs" / self.name

    @property
    def log(self) -> str:
        return (self.cwd / f"runs/slurm/{self.name}-{self.id}.log").read_text(errors="replace")

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.parent.name for path in self.run_dir.glob("checkpoints/*/manifest.json"))

    def until_log(self, words: str, limit_s: float = 180) -> None:
        self.cluster.until(lambda: self._log_has(words), f"{words!r} in the log of {self.name}", limit_s)

    def until_saved(self, limit_s: float = 180) -> None:
        """Wait for a checkpoint that is not there yet."""
        before = self.checkpoints
        self.cluster.until(lambda: set(self.checkpoints) - set(before), f"a checkpoint of {self.name}", limit_s)

    def until_restart(self, number: int) -> None:
        self.until_log(f"restart {number}: ", 60)

    def _log_has(self, words: str) -> bool:
        try:
            return words in self.log
        except FileNotFoundError:
            return False


def submit(cluster: Cluster, cwd: Path, *words: str | Path, name: str = "it", **variables: str) -> Job:
    """`harness submit` of digits, with some options more."""
    command = [BIN / "harness", "submit", "--config", ROOT / "configs/digits.yaml", "--cpus_per_task", "1"]
    told = cluster.command(*command, "--run_name", name, *_OPTIONS, *words, cwd=cwd, extra=variables)
    found = re.search(r"^job +(\d+): ", told)
    assert found is not None, told
    return Job(cluster, cwd, found[1], name)


def assert_each_step_once(cwd: Path, run: Run) -> int:
    """Each optimizer step from the first to the last has its one point; returns the last."""
    steps = [point.step for point in history(client(cwd), run, "train/loss")]
    assert steps == list(range(1, len(steps) + 1)), steps
    return len(steps)


def run_of(job: Job) -> Run:
    """The one run that MLflow has of a job; fails if there are more."""
    return only_run(job.cwd, wait_for_end_s=20)
