"""Read SLURM's environment variables.

variable                    set in                used as
SLURM_CLUSTER_NAME          batch script, tasks   part of the identity: job ids repeat between clusters
SLURM_JOB_ID                batch script, tasks   the job, in tags and to find its run after a requeue
SLURM_ARRAY_JOB_ID          an array's jobs       id of the array
SLURM_ARRAY_TASK_ID         an array's jobs       index of the job in the array
SLURM_RESTART_COUNT         a requeued job        number of requeues
SLURM_STEP_ID               tasks                 number of the `srun` in the job
SLURM_PROCID                tasks                 RANK
SLURM_NTASKS                tasks                 WORLD_SIZE
SLURM_LOCALID               tasks                 LOCAL_RANK
SLURM_NODEID                tasks                 GROUP_RANK, the node's number
SLURM_STEP_NODELIST         tasks                 MASTER_ADDR: the first host, which runs task 0
SLURM_STEP_TASKS_PER_NODE   tasks                 LOCAL_WORLD_SIZE
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from harness.errors import LaunchError


@dataclass(frozen=True)
class SlurmJob:
    """A job, or one job of an array; `array` is the array's id and the index in it, such as ``17_3``."""

    cluster: str
    job_id: str
    array: str | None
    restart_count: int

    @property
    def identity(self) -> str:
        """The id that users see."""
        return self.array or self.job_id


@dataclass(frozen=True)
class SlurmTask:
    """One task (rank) of a step. Hosts are in the order of the step's nodes; the first runs task 0."""

    job: SlurmJob
    step_id: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    hosts: tuple[str, ...]


def read_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the job of this process; None outside a job."""
    if "SLURM_JOB_ID" not in environment:
        return None
    array = None
    if "SLURM_ARRAY_JOB_ID" in environment:
        array = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    count = environment.get("SLURM_RESTART_COUNT", "0")
    cluster = environment.get("SLURM_CLUSTER_NAME", "")
    return SlurmJob(cluster, environment["SLURM_JOB_ID"], array, int(count) if count.isdigit() else 0)


def read_task(environment: Mapping[str, str] = os.environ) -> SlurmTask:
    """Return the task of this process.

    Raises:
        LaunchError: if `srun` did not start it.
    """
    job = read_job(environment)
    if job is None:
        raise LaunchError(
            "SLURM_JOB_ID is not set, so SLURM did not start this process; use srun, as slurm/train.sbatch does"
        )

    def number(variable: str) -> int:
        value = environment.get(variable, "")
        if not value.isdigit():
            raise LaunchError(
                f"{variable}: must be a number, got {value!r}; start this process with srun, as slurm/train.sbatch does"
            )
        return int(value)

    node_rank = number("SLURM_NODEID")
    hosts = tuple(hosts_of(environment.get("SLURM_STEP_NODELIST", "")))
    per_node = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if not hosts or len(per_node) != len(hosts):
        raise LaunchError(
            f"SLURM_STEP_NODELIST is {environment.get('SLURM_STEP_NODELIST')!r} and SLURM_STEP_TASKS_PER_NODE "
            f"{environment.get('SLURM_STEP_TASKS_PER_NODE')!r}: these do not describe the same nodes"
        )
    return SlurmTask(
        job=job,
        step_id=environment.get("SLURM_STEP_ID", "0"),
        rank=number("SLURM_PROCID"),
        world_size=number("SLURM_NTASKS"),
        local_rank=number("SLURM_LOCALID"),
        local_world_size=per_node[node_rank],
        node_rank=node_rank,
        hosts=hosts,
    )


def hosts_of(nodelist: str) -> list[str]:
    """Expand SLURM's short form of hosts: ``n[01-03,7],gpu-[1-2]-ib[0-1],x`` -> n01, n02, n03, n7, gpu-1-ib0, ...

    The result is that of ``scontrol show hostnames``, a command that a node may lack.

    Raises:
        LaunchError: if the list has another form.
    """
    hosts = []
    for name in _split(nodelist):
        # Literal text and contents of brackets alternate.
        parts = re.split(r"\[([^][]*)\]", name)
        if any("[" in part or "]" in part for part in parts):
            raise LaunchError(f"{nodelist!r} is not a list of hosts")
        expanded = [parts[0]]
        for position in range(1, len(parts), 2):
            numbers = list(_numbers(parts[position], nodelist))
            expanded = [before + number + parts[position + 1] for before in expanded for number in numbers]
        hosts += expanded
    return hosts


def tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node: ``2(x3),1`` -> 2, 2, 2, 1.

    Raises:
        LaunchError: if the text has another form.
    """
    counts: list[int] = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(f"{text!r} is not a number of tasks for each node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(nodelist: str) -> Iterator[str]:
    name, depth = "", 0
    for letter in nodelist:
        if letter == "," and depth == 0:
            if name:
                yield name
            name = ""
            continue
        depth += (letter == "[") - (letter == "]")
        name += letter
    if name:
        yield name


def _numbers(text: str, nodelist: str) -> Iterator[str]:
    """Expand the content of brackets: ``01-03,7`` -> 01, 02, 03, 7."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise LaunchError(f"{nodelist!r} is not a list of hosts")
        first, last = match[1], match[2] or match[1]
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}}"
