"""Jobs beside each other: two on one node, an array, and a session of one's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launching import BIN, ROOT
from tests.mlflow_reader import all_runs, client
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ENDLESS, assert_each_step_once, submit

pytestmark = pytest.mark.services


def test_two_jobs_on_a_node_do_not_meet_and_one_goes_on_when_the_other_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("--tasks_per_node", "2", "--time", "30", "--sbatch", f"nodelist={cluster.nodes[1]}")
    # A name that bash and SLURM would read as something else, if they were let.
    jobs = [submit(cluster, tmp_path, *words, *ENDLESS, name=name) for name in ("one", "the-2nd.x_y")]
    for job in jobs:
        job.until_saved()
    one, other = jobs
    cluster.command("scancel", one.id)
    assert cluster.until_over(one.id) == "CANCELLED"
    assert "SIGTERM: stopped after step" in one.log
    before = other.checkpoints
    cluster.until(lambda: other.checkpoints[-1] > before[-1], "the other job's next checkpoint")
    cluster.command("scancel", other.id)
    assert cluster.until_over(other.id) == "CANCELLED"
    runs = {run.info.run_name: run for run in all_runs(client(tmp_path))}
    assert sorted(runs) == ["one", "the-2nd.x_y"]
    for run in runs.values():
        # What it has saved last is what it has told: all of it was delivered.
        assert run.info.status == "KILLED"
        assert run.data.tags["harness.attempt.1.world_size"] == "2"
        assert run.data.tags["harness.end_reason"] == "stopped by SIGTERM"
        assert_each_step_once(tmp_path, run)


@pytest.mark.timeout(600)
def test_tasks_of_an_array_are_runs_below_one_and_each_is_queued_again_for_itself(
    cluster: Cluster, tmp_path: Path
) -> None:
    rates = [0.001, 0.002, 0.003, 0.004]
    lines = [f"--optimizer.init_args.lr {rate} --tracking.tags '{{note: \"of {rate}\"}}'" for rate in rates]
    # The last is there until it is told to end.
    lines[3] += " --trainer.max_epochs 100000"
    (tmp_path / "sweep.txt").write_text("\n".join(lines) + "\n")
    options = ("--trainer.max_epochs", "2", "--checkpoint.every_n_epochs", "1", "--checkpoint.save_top_k", "0")
    array = submit(cluster, tmp_path, "--sweep", "sweep.txt", "--time", "30", *options, name="sweep")

    def log(task: int) -> str:
        path = tmp_path / f"runs/slurm/sweep-{array.id}_{task}.log"
        return path.read_text() if path.exists() else ""

    def run_dir(task: int) -> Path:
        return tmp_path / f"runs/sweep-{array.id}_{task}"

    last = f"{array.id}_3"
    cluster.until(lambda: list(run_dir(3).glob("checkpoints/*/manifest.json")), "a checkpoint of the last task", 120)
    cluster.command("scancel", "--batch", "--signal=USR1", last)
    cluster.until(lambda: ", restart 1: " in log(3) and "resumed from " in log(3), "the last task to resume", 120)
    # As one who stops a sweep does; a signal that comes before there is somebody to hear it is a job that is killed.
    cluster.command("scancel", last)
    for task in range(3):
        assert cluster.until_over(f"{array.id}_{task}") == "COMPLETED", log(task)
    assert cluster.until_over(last) == "CANCELLED", log(3)

    runs = {run.info.run_name: run for run in all_runs(client(tmp_path))}
    parent = runs.pop("sweep")
    assert sorted(runs) == [f"sweep-{array.id}_{task}" for task in range(4)]
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    by_task = [runs[f"sweep-{array.id}_{task}"] for task in range(4)]
    assert [float(run.data.params["optimizer.init_args.lr"]) for run in by_task] == rates
    assert [run.data.tags["note"] for run in by_task] == [f"of {rate}" for rate in rates]
    assert [run.info.status for run in by_task] == ["FINISHED"] * 3 + ["KILLED"]
    assert "harness.attempt.2.slurm_job_id" in by_task[3].data.tags
    for run in by_task:
        assert_each_step_once(tmp_path, run)


def test_commands_of_one_process_work_in_a_session(cluster: Cluster, tmp_path: Path) -> None:
    config = f"--config {ROOT}/configs/digits.yaml --trainer.max_epochs 1 --trainer.limit_train_batches 4"
    # As they are, and as the one rank of a step; what SLURM has set is nothing to the first two.
    session = f"""
        {BIN}/harness debug --config {ROOT}/configs/digits.yaml && {BIN}/harness train {config} --run_name alone &&
        srun --ntasks 1 --gpus-per-task 1 {BIN}/harness rank {config} --run_name step
    """
    words = ("--nodes=1", "--ntasks=2", "--gpus-per-node=1", "--time=5")
    told = cluster.command("salloc", *words, "bash", "-ec", session, cwd=tmp_path)
    assert re.search(r"first training batch: \[float32\[16, 1, 8, 8\]", told), told
    runs = {run.info.run_name: run for run in all_runs(client(tmp_path))}
    assert sorted(runs) == ["alone", "step"]
    for run in runs.values():
        assert run.info.status == "FINISHED"
        assert run.data.tags["harness.attempt.1.world_size"] == "1"
