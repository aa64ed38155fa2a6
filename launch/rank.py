"""`harness rank`: one rank of a SLURM step, which `srun` starts once for each (slurm/train.sbatch).

There is no launcher's agent between SLURM and the ranks: signals, and the end of the job, reach them by themselves.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.config.parsing import parse_run_config
from harness.distributed.job_secret import FILE_NAME, FILE_VARIABLE, SECRET_VARIABLE, discard
from harness.distributed.meeting import JOB_VARIABLE
from harness.distributed.slurm_env import SlurmTask, read_task
from harness.errors import EXIT_DONE, EXIT_REQUEUE, HarnessError, LaunchError
from harness.io.standard_streams import flush, write_error
from launch.command_parser import CommandParser
from launch.local import STRATEGIES
from launch.strategy_environment import strategy_environment


def rank(words: Sequence[str]) -> int:
    """Become the rank that SLURM says; returns its exit code.

    Raises:
        HarnessError: if this is no task of SLURM's, or the strategy cannot run on so many.
    """
    parser = CommandParser(prog="harness rank", allow_abbrev=False, description=__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    own, rest = parser.parse_known_args(list(words))
    task = read_task()
    # Before torch is imported, which reads it then.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(rank_environment(task))
    try:
        os.environ.update(strategy_environment(_strategy(own.strategy, task), task.world_size))
        if task.world_size > 1 and SECRET_VARIABLE not in os.environ:
            os.environ[FILE_VARIABLE] = str(_secret_file(parse_run_config(rest, prog="harness train").run_dir))
        _check_gpus(task)
    except HarnessError:
        # All ranks have the same error: one says it.
        if task.rank == 0:
            raise
        sys.exit(LaunchError.exit_code)
    from harness.__main__ import leave, main

    try:
        code = main(rest, prog="harness train")
    finally:
        if task.rank == 0:
            # The ranks may not have met.
            discard()
    if code == EXIT_REQUEUE and task.rank > 0:
        # Rank zero says it for all, when it has delivered: `srun --kill-on-bad-exit` must not end it before.
        flush()
        os._exit(EXIT_DONE)
    leave(code)


def _strategy(asked: str, task: SlurmTask) -> str:
    """What was asked for; a job that goes on with one rank has nothing to divide."""
    if task.world_size > 1 or asked == "single":
        return asked
    write_error(f"harness: one rank: {asked} becomes single\n")
    return "single"


def rank_environment(task: SlurmTask) -> Mapping[str, str]:
    """What torch's and accelerate's own launchers would set for a rank."""
    if task.world_size == 1:
        return {}
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.local_world_size),
        "GROUP_RANK": str(task.node_rank),
        "MASTER_ADDR": task.hosts[0],
        # A requeued job, and a second step in it, meet anew.
        JOB_VARIABLE: f"{task.job.cluster}:{task.job.job_id}.{task.step_id}.{task.job.restart_count}",
    }


def _secret_file(run_dir: str) -> Path:
    """Where a step that has no secret in its environment has it, the same on all ranks."""
    job = re.sub(r"[^A-Za-z0-9._-]", "-", os.environ[JOB_VARIABLE])
    return Path(run_dir).absolute() / "slurm" / FILE_NAME.format(job)


def _check_gpus(task: SlurmTask) -> None:
    import torch

    count = torch.cuda.device_count()
    if 0 < count < task.local_world_size:
        raise LaunchError(
            f"{task.local_world_size} ranks on a node see {count} GPU{'s' * (count > 1)} each; give the job "
            "--gpus_per_node, one for each rank, and no --gpus-per-task or --gpu-bind, which hide the others"
        )
