"""What `accelerate launch` tells its ranks about a strategy, without its launcher: by its own code.

The files of configs/accelerate/ say what a strategy is, for `harness launch` and for SLURM alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from launch.local import Plan, accelerate_command

_PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def strategy_environment(strategy: str, num_processes: int) -> Mapping[str, str]:
    """The variables that each rank is given.

    Effects: imports torch (seconds); any thread; nothing on disk.

    Args:
        strategy: one of `STRATEGIES`.
        num_processes: ranks in all.

    Raises:
        LaunchError: if the strategy cannot run on so many.
    """
    words = accelerate_command(Plan(strategy, num_processes, 0, ()))
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
    return {name: value for name, value in environment.items() if name.startswith(_PREFIXES)}
