"""Create the Accelerator for the requested strategy.

Accelerate may silently run less than requested: one process in place of N, DDP in place of FSDP2. This module raises
instead, with the remedy.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    DeepSpeedPlugin,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from harness.config.schema import NUM_PROCESSES_VARIABLE, TrainerConfig
from harness.distributed import cpu_strategies, rendezvous
from harness.errors import LaunchError

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def start(trainer: TrainerConfig, seed: int) -> Accelerator:
    """Create the Accelerator that the launcher's environment requests; `seed` determines the order of the data.

    Effects: collective (rendezvous of the ranks); main thread; blocks until all ranks have started, at most 30 minutes;
    nothing on disk.

    Raises:
        LaunchError: if other processes or another strategy would run than requested.
    """
    _refuse_lost_processes()
    uses_deepspeed = _flag("ACCELERATE_USE_DEEPSPEED")
    uses_fsdp = _flag("ACCELERATE_USE_FSDP")
    if uses_fsdp and os.environ.get("FSDP_VERSION", "1") == "1" and not _flag("FSDP_USE_ORIG_PARAMS"):
        raise LaunchError(
            "FSDP1 without the original parameters hides them from an optimizer that was made before; set "
            "`fsdp_use_orig_params: true` or `fsdp_version: 2` in the accelerate configuration "
            "(see configs/accelerate/fsdp2.yaml)"
        )
    on_cpu = not torch.accelerator.is_available()
    init = InitProcessGroupKwargs(timeout=timedelta(minutes=30), init_method=rendezvous.init_method())
    precision = _ACCELERATE_PRECISION[trainer.mixed_precision]
    if precision == "fp16" and on_cpu:
        raise LaunchError("trainer.mixed_precision: fp16 needs a GPU, and there is none; use bf16 or fp32")
    plugins: dict[str, Any] = {}
    if uses_deepspeed:
        if on_cpu:
            cpu_strategies.prepare_deepspeed()
            init.backend = "gloo"
        plugins["deepspeed_plugin"] = _deepspeed_plugin(trainer, on_cpu)
    elif on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if uses_fsdp:
            cpu_strategies.prepare_fsdp(precision, init)
    accelerator = Accelerator(
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=trainer.gradient_accumulation_steps,
            # The training loop steps the scheduler once for each optimizer step.
            adjust_scheduler=False,
        ),
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        kwargs_handlers=[init],
        **plugins,
    )
    check_launch(accelerator)
    return accelerator


def with_cpu_strategies(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Extend the arguments of a script's `Accelerator` so that the requested strategy runs on a CPU too.

    Effects: collective for FSDP, whose process group it creates, else not; main thread.
    """
    plugin = kwargs.get("fsdp_plugin")
    uses_deepspeed, uses_fsdp = _flag("ACCELERATE_USE_DEEPSPEED"), _flag("ACCELERATE_USE_FSDP") or plugin is not None
    if torch.accelerator.is_available() or AcceleratorState._shared_state:
        return kwargs
    if not uses_deepspeed:
        # Without this variable each process would train separately.
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if not uses_fsdp:
            return kwargs
    handlers = list(kwargs.get("kwargs_handlers") or [])
    init = next((each for each in handlers if isinstance(each, InitProcessGroupKwargs)), None)
    if init is None:
        handlers.append(init := InitProcessGroupKwargs())
    made = {**kwargs, "kwargs_handlers": handlers}
    if uses_deepspeed:
        cpu_strategies.prepare_deepspeed()
        init.backend = "gloo"
        if kwargs.get("deepspeed_plugin") is None and kwargs.get("deepspeed_plugins") is None:
            deepspeed = made["deepspeed_plugin"] = DeepSpeedPlugin()
            deepspeed.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    else:
        precision = kwargs.get("mixed_precision") or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        cpu_strategies.prepare_fsdp(str(precision), init, plugin)
    return made


def _deepspeed_plugin(trainer: TrainerConfig, on_cpu: bool) -> DeepSpeedPlugin:
    plugin = DeepSpeedPlugin(
        gradient_accumulation_steps=trainer.gradient_accumulation_steps,
        gradient_clipping=trainer.max_grad_norm,
    )
    # accelerate converts None to "auto", and "auto" to 1.0. For DeepSpeed, 0 means no clipping.
    plugin.deepspeed_config["gradient_clipping"] = trainer.max_grad_norm or 0.0
    if on_cpu:
        # Otherwise DeepSpeed requires its own compiled CPU Adam.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    return plugin


def check_launch(accelerator: Accelerator) -> None:
    """Check that the processes and the strategy that run are the requested ones.

    Raises:
        LaunchError: with the reason and the remedy.
    """
    requested_size = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != requested_size:
        remedy = "set ACCELERATE_USE_CPU=true, or use `harness launch`"
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            # Without the name of a backend, accelerate does not count DeepSpeed's ranks.
            remedy = "give transformers' TrainingArguments use_cpu=True, or create the Accelerator with a gloo backend"
        raise LaunchError(
            f"{requested_size} processes were started, but each trains separately (accelerate found "
            f"{accelerator.num_processes}); without GPUs {remedy}"
        )
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if _flag("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1 and not is_fsdp:
        raise LaunchError(
            f"FSDP was requested, but accelerate would run {accelerator.distributed_type.value}; "
            "create the Accelerator with harness.distributed.strategies.start, or train on GPUs"
        )
    if _flag("ACCELERATE_USE_DEEPSPEED") and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise LaunchError(
            f"DeepSpeed was requested, but accelerate would run {accelerator.distributed_type.value}; "
            "start it with `accelerate launch --use_deepspeed` or `harness launch --strategy zero2`, without "
            "ACCELERATE_USE_CPU"
        )


def _refuse_lost_processes() -> None:
    """Refuse a launcher that started one process in place of N.

    Both `accelerate launch --cpu --num_processes 2` and a configuration file with `use_cpu: true` do so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return
    requested = os.environ.get(NUM_PROCESSES_VARIABLE) or _parent_requested_processes()
    if requested is not None and int(requested) > 1:
        raise LaunchError(
            f"{requested} processes were requested, but the launcher started one; omit --cpu and `use_cpu: true` "
            "(CPUs are detected without them), and use a file of configs/accelerate/ or `harness launch`"
        )


def _parent_requested_processes() -> str | None:
    """Return `num_processes` of the parent process if it is `accelerate launch`. Linux only."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    words = raw.decode(errors="replace").split("\0")
    return requested_processes(words, Path(os.readlink(f"/proc/{os.getppid()}/cwd")))


def requested_processes(words: list[str], directory: Path) -> str | None:
    """Return `num_processes` of an `accelerate launch` command line in a working directory, or of its config file."""
    if not any(Path(word).name.startswith("accelerate") for word in words[:3]) or "launch" not in words:
        return None
    options = _options(words[words.index("launch") + 1 :])
    if "num_processes" in options:
        return options["num_processes"]
    if "config_file" not in options:
        return None
    try:
        content = yaml.safe_load((directory / options["config_file"]).read_text())
    except (OSError, yaml.YAMLError):
        return None
    count = content.get("num_processes") if isinstance(content, dict) else None
    return None if count is None else str(count)


def _options(words: list[str]) -> dict[str, str]:
    """Return the ``--name value`` and ``--name=value`` options before the script or module."""
    found: dict[str, str] = {}
    for position, word in enumerate(words):
        if word in ("-m", "--module") or word.endswith(".py"):
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            following = words[position + 1] if position + 1 < len(words) else ""
            found[name.replace("-", "_")] = value if equals else following
    return found


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
