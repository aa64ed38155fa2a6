"""Queued again, by a job's own request ahead of its time limit and by SLURM itself: the same run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.run.stop_request import ask_to_stop
from harness.tracking.publisher.sync import is_incomplete
from tests.launching import BIN, harness, started
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ENDLESS, assert_each_step_once, run_of, submit

pytestmark = pytest.mark.services


@pytest.mark.timeout(600)
def test_same_run_goes_on_when_the_time_limit_comes_and_then_with_half_the_ranks(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("--nodes", "1-2", "--tasks_per_node", "2", "--strategy", "fsdp2", "--time", "1", "--lead_s", "30")
    job = submit(cluster, tmp_path, *words, *ENDLESS)
    # SLURM itself sends the signal, ahead of the minute's end.
    job.until_log("SIGUSR1: the time limit is near", 120)
    cluster.until(lambda: cluster.state(job.id) == "PENDING", "the job to be queued again", 180)
    assert job.checkpoints, job.log
    cluster.command("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    job.until_restart(1)
    assert cluster.facts(job.id)["Restarts"] == "1"
    job.until_saved()
    assert cluster.facts(job.id)["NumNodes"] == "2"
    # A node is taken out. The job ends there as it would at its time limit, and goes on where it may.
    cluster.command("scontrol", "update", f"NodeName={cluster.nodes[1]}", "State=DRAIN", "Reason=test")
    cluster.command("scancel", "--batch", "--signal=USR1", job.id)
    job.until_restart(2)
    assert cluster.facts(job.id)["BatchHost"] == cluster.nodes[0]
    job.until_saved()
    cluster.command(BIN / "harness", "stop", job.run_dir, "--reason", "it has seen enough")
    assert cluster.until_over(job.id) == "FAILED"
    assert cluster.facts(job.id)["ExitCode"] == "75:0"

    assert "an optimizer step takes 64 samples, as before: 2 ranks x 16 x 2 accumulated" in job.log
    assert "harness stop: it has seen enough" in job.log
    run = run_of(job)
    assert run.info.status == "KILLED"
    tags = run.data.tags
    assert [tags[f"harness.attempt.{number}.world_size"] for number in (1, 2, 3)] == ["4", "4", "2"]
    assert [tags[f"harness.attempt.{number}.num_nodes"] for number in (1, 2, 3)] == ["2", "2", "1"]
    assert tags["harness.slurm_job_id"] == job.id
    last = assert_each_step_once(tmp_path, run)
    assert f"step-{last:08}" in job.checkpoints


def test_preempted_job_goes_on_and_is_delivered_from_the_login_node_when_its_nodes_have_no_way_out(
    cluster: Cluster, tmp_path: Path
) -> None:
    words = ("--tasks_per_node", "2", "--time", "30", "--partition", "main", "--tracking.offline")
    job = submit(cluster, tmp_path, *words, "--sbatch", f"nodelist={cluster.nodes[0]}", *ENDLESS)
    job.until_saved()
    watch = harness("sync", "--all", tmp_path / "runs", "--watch", "--every_s", "1")
    with started(watch, tmp_path) as login_node:
        urgent = ("--partition=urgent", f"--nodelist={cluster.nodes[0]}", "--exclusive", "--output=urgent.log")
        other = cluster.command("sbatch", "--parsable", *urgent, "--wrap", "hostname", cwd=tmp_path).strip()
        assert cluster.until_over(other) == "COMPLETED"
        assert "SIGTERM: stopped after step" in job.log
        job.until_restart(1)
        job.until_saved()
        ask_to_stop(job.run_dir, "it has seen enough")
        assert cluster.until_over(job.id) == "FAILED"
        cluster.until(lambda: not is_incomplete(job.run_dir), "the delivery")
        login_node.terminate()
        assert login_node.wait(30) == 0
    run = run_of(job)
    assert run.info.status == "KILLED"
    assert run.data.tags["harness.attempt.2.num_nodes"] == "1"
    assert_each_step_once(tmp_path, run)


def test_job_is_not_started_again_when_its_starts_get_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "--time", "30", *ENDLESS, HARNESS_MAX_IDLE_RESTARTS="1")
    job.until_log("restart 0: ")
    cluster.until(lambda: (job.run_dir / "restarts.json").exists(), "the first start to be counted")
    cluster.command("scontrol", "requeue", job.id)
    assert cluster.until_over(job.id) == "FAILED"
    assert "1 starts in a row have begun at step 0, and none has left a checkpoint" in job.log
    assert not job.checkpoints
