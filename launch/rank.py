"""`harness rank`: one rank of a SLURM step; slurm/train.sbatch starts it with `srun` once for each rank.

No launcher runs between SLURM and the ranks, so signals and the end of the job reach them directly.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.config.parsing import parse_run_config
from harness.distributed.job_secret import FILE_NAME, FILE_VARIABLE, JOB_VARIABLE, SECRET_VARIABLE, JobSecret
from harness.distributed.slurm_env import SlurmTask, read_task
from harness.errors import EXIT_DONE, EXIT_REQUEUE, HarnessError, LaunchError
from harness.io.standard_streams import flush, write_error
from launch.command_parser import CommandParser
from launch.local import STRATEGIES, LaunchPlan, accelerate_command

_STRATEGY_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def rank(words: Sequence[str]) -> int:
    """Train as the rank that SLURM's variables describe, and return the exit code.

    Raises:
        HarnessError: if srun did not start this process, or the strategy cannot run on the number of ranks.
    """
    parser = CommandParser(prog="harness rank", allow_abbrev=False, description=__doc__)
    parser.add_argument("--strategy", choices=STRATEGIES, default="ddp")
    own, rest = parser.parse_known_args(list(words))
    task = read_task()
    # Before torch is imported, because torch reads the variable at import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.update(rank_environment(task))
    try:
        os.environ.update(strategy_environment(_strategy(own.strategy, task), task.world_size))
        if task.world_size > 1 and SECRET_VARIABLE not in os.environ:
            os.environ[FILE_VARIABLE] = str(_secret_file(parse_run_config(rest, prog="harness train").run_dir))
        _check_gpus(task)
    except HarnessError:
        # All ranks have the same error; rank 0 reports it.
        if task.rank == 0:
            raise
        sys.exit(LaunchError.exit_code)
    from harness.__main__ import exit_process, main

    try:
        code = main(rest, prog="harness train")
    finally:
        if task.rank == 0 and FILE_VARIABLE in os.environ and SECRET_VARIABLE not in os.environ:
            # The rendezvous may not have completed.
            JobSecret.from_environment().discard()
    if code == EXIT_REQUEUE and task.rank > 0:
        # Rank 0 returns the code for all ranks after it has delivered the run to MLflow. If another rank returned it,
        # `srun --kill-on-bad-exit` would end rank 0 before that.
        flush()
        os._exit(EXIT_DONE)
    exit_process(code)


def _strategy(requested: str, task: SlurmTask) -> str:
    """Return the requested strategy, or ``single`` for a job that resumes on one rank."""
    if task.world_size > 1 or requested == "single":
        return requested
    write_error(f"harness: one rank: using strategy single in place of {requested}\n")
    return "single"


def rank_environment(task: SlurmTask) -> Mapping[str, str]:
    """Return the variables that torch's and accelerate's launchers set for a rank."""
    if task.world_size == 1:
        return {}
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.world_size),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.local_world_size),
        "GROUP_RANK": str(task.node_rank),
        "MASTER_ADDR": task.hosts[0],
        # A requeued job and a second step of a job each have their own rendezvous.
        JOB_VARIABLE: f"{task.job.cluster}:{task.job.job_id}.{task.step_id}.{task.job.restart_count}",
    }


def strategy_environment(strategy: str, num_processes: int) -> Mapping[str, str]:
    """Compute the variables by which `accelerate launch` configures a strategy, with accelerate's own code.

    configs/accelerate/ defines the strategies, for `harness launch` and for SLURM.

    Effects: imports torch (seconds); any thread; nothing on disk.

    Raises:
        LaunchError: if the strategy cannot run on that number of ranks.
    """
    words = accelerate_command(LaunchPlan(strategy, num_processes, 0, ()))
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    arguments = launch_command_parser().parse_args(words[2:])
    arguments, defaults, has_precision = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif num_processes > 1:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(_STRATEGY_PREFIXES)}


def _secret_file(run_dir: str) -> Path:
    """Return the secret's file, which is the same on all ranks, for a step without a secret in its environment."""
    job = re.sub(r"[^A-Za-z0-9._-]", "-", os.environ[JOB_VARIABLE])
    return Path(run_dir).absolute() / "slurm" / FILE_NAME.format(job)


def _check_gpus(task: SlurmTask) -> None:
    import torch

    count = torch.cuda.device_count()
    if 0 < count < task.local_world_size:
        raise LaunchError(
            f"{task.local_world_size} ranks on a node see {count} GPU{'s' * (count > 1)} each; give the job "
            "--gpus_per_node, one for each rank, without --gpus-per-task and --gpu-bind, which hide the other GPUs"
        )
