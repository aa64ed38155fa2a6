"""Create the Accelerator for the requested strategy, and describe where this rank runs.

Accelerate may silently run less than requested: one process in place of N, DDP in place of FSDP2. Such a run stops here
with the remedy.
"""

from __future__ import annotations

import functools
import os
import resource
import sys
from dataclasses import dataclass
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
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Topology:
    """The processes and hardware of a run, seen from one rank.

    Args:
        strategy: single, ddp, fsdp1, fsdp2, hsdp, zero1, zero2 or zero3.
        rank: this rank.
        world_size: number of ranks.
        num_nodes: number of nodes.
        device: this rank's device, such as ``cuda:0``.
        device_name: name of the hardware.
        mixed_precision: fp32, bf16 or fp16.
    """

    strategy: str
    rank: int
    world_size: int
    num_nodes: int
    device: str
    device_name: str
    mixed_precision: str

    @property
    def run_facts(self) -> dict[str, str]:
        """The facts that are the same on all ranks, as text for tags."""
        return {
            "strategy": self.strategy,
            "world_size": str(self.world_size),
            "num_nodes": str(self.num_nodes),
            "device": self.device.partition(":")[0],
            "device_name": self.device_name,
            "mixed_precision": self.mixed_precision,
        }


def start(trainer: TrainerConfig, seed: int) -> Accelerator:
    """Create the Accelerator that the launcher's environment requests.

    Effects: collective (rendezvous of the ranks); main thread; blocks until all ranks have started, at most 30 minutes;
    nothing on disk.

    Args:
        trainer: precision, accumulation and clipping.
        seed: of the data order.

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
            # The loop itself steps the scheduler once for each optimizer step.
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
    """Return the arguments for a script's `Accelerator` with which the requested strategy runs on a CPU too.

    Effects: collective if it creates the process group (FSDP), else not; main thread.

    Args:
        kwargs: arguments of the script.
    """
    plugin = kwargs.get("fsdp_plugin")
    uses_deepspeed, uses_fsdp = _flag("ACCELERATE_USE_DEEPSPEED"), _flag("ACCELERATE_USE_FSDP") or plugin is not None
    if torch.accelerator.is_available() or AcceleratorState._shared_state:
        return kwargs
    if not uses_deepspeed:
        # Without it each process would train separately.
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
    # accelerate turns no clipping into "auto", and "auto" into 1.0. For DeepSpeed, 0 means no clipping.
    plugin.deepspeed_config["gradient_clipping"] = trainer.max_grad_norm or 0.0
    if on_cpu:
        # Otherwise DeepSpeed requires its own compiled CPU Adam.
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
    return plugin


def check_launch(accelerator: Accelerator) -> None:
    """Check that the processes and the strategy that run are those requested of the launcher.

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
    """Detect a launcher that was requested to start N processes and started one.

    `accelerate launch --cpu --num_processes 2` does that, and so does a configuration file with `use_cpu: true`.
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
    """`num_processes` of the parent process, if it is `accelerate launch`. Linux only."""
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return None
    words = raw.decode(errors="replace").split("\0")
    return requested_processes(words, Path(os.readlink(f"/proc/{os.getppid()}/cwd")))


def requested_processes(words: list[str], directory: Path) -> str | None:
    """Return `num_processes` of an `accelerate launch` command line, or of its configuration file.

    Args:
        words: the command line.
        directory: its working directory.
    """
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
    """The ``--name value`` and ``--name=value`` options before the script or module."""
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


def strategy_of(accelerator: Accelerator) -> str:
    """Return the strategy that runs, by its name in `harness launch --strategy`, or ``fsdp1``."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.state.fsdp_plugin.fsdp_version == 1:
            return "fsdp1"
        mesh = accelerator.parallelism_config
        return "hsdp" if mesh is not None and mesh.dp_replicate_enabled else "fsdp2"
    return "ddp" if accelerator.num_processes > 1 else "single"


def describe(accelerator: Accelerator) -> Topology:
    """Return the processes and hardware of this run."""
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    return Topology(
        strategy=strategy_of(accelerator),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_nodes=max(1, accelerator.num_processes // max(1, local_size)),
        device=str(accelerator.device),
        device_name=_device_name(accelerator.device),
        mixed_precision=precision,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    return device.type


def memory_bytes(device: torch.device) -> float:
    """Return the peak of memory allocated for tensors (CUDA), or the resident memory of this process, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if sys.platform != "linux":
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return float(int(os.pread(_statm(), 256, 0).split()[1]) * _PAGE_BYTES)


@functools.cache
def _statm() -> int:
    """Descriptor of this process's memory figures, opened once because each window reads them."""
    return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
