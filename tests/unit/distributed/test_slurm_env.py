"""SLURM's variables and short forms. `tests/slurm` runs a real SLURM."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.distributed.slurm_env import SlurmJob, hosts_of, read_job, read_task, tasks_per_node
from harness.errors import LaunchError

TASK = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[01-03]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("node[01-04]", ["node01", "node02", "node03", "node04"]),
        ("n[1,3-4,10]", ["n1", "n3", "n4", "n10"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("a[1-2]-ib[0-1],login,b3", ["a1-ib0", "a1-ib1", "a2-ib0", "a2-ib1", "login", "b3"]),
        ("gpu-a-1,gpu-b-[1-2]", ["gpu-a-1", "gpu-b-1", "gpu-b-2"]),
        ("", []),
    ],
)
def test_hosts_are_expanded_when_in_short_form(nodelist: str, hosts: list[str]) -> None:
    assert hosts_of(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["n[1-", "n]1[", "n[a-b]", "n[1-2-3]", "n[[1]]"])
def test_hosts_are_refused_when_in_another_form(nodelist: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(repr(nodelist))):
        hosts_of(nodelist)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), max_size=6))
def test_tasks_are_expanded_when_in_short_form(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in runs)
    assert tasks_per_node(text) == [count for count, times in runs for _ in range(times)]


@given(st.integers(1, 4), st.integers(0, 200), st.integers(0, 30))
def test_digits_are_those_of_the_first_host_when_expanded(width: int, first: int, count: int) -> None:
    begin = f"{first:0{width}}"
    hosts = hosts_of(f"n[{begin}-{first + count}]")
    assert hosts == [f"n{number:0{len(begin)}}" for number in range(first, first + count + 1)]


def test_task_is_read_when_its_variables_are_set() -> None:
    task = read_task(TASK)
    assert (task.rank, task.world_size, task.local_rank, task.local_world_size, task.node_rank) == (3, 5, 1, 2, 1)
    assert task.hosts == ("n01", "n02", "n03")
    assert read_task({**TASK, "SLURM_NODEID": "2"}).local_world_size == 1


@pytest.mark.parametrize("missing", sorted(TASK.keys() - {"SLURM_STEP_ID"}))
def test_error_names_the_variable_when_one_is_missing(missing: str) -> None:
    with pytest.raises(LaunchError, match=missing):
        read_task({name: value for name, value in TASK.items() if name != missing})


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, SlurmJob("", "17", None, 0)),
        ({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2", "SLURM_CLUSTER_NAME": "c"}, SlurmJob("c", "17", None, 2)),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, SlurmJob("", "19", "17_2", 0)),
    ],
)
def test_job_is_read_when_its_variables_are_set(environment: dict[str, str], job: SlurmJob | None) -> None:
    assert read_job(environment) == job
