"""Ranks that save under one strategy, and ranks that restore under another what those have saved."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.nn import functional as F

from harness.checkpoint.format.commit import read_manifest
from harness.checkpoint.restore.restore import restore_tensors, restore_weights
from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.optimizer_record import restore_optimizer_extras
from harness.checkpoint.state.trainer_state import Moment, Watched, read_trainer_state
from harness.config.schema import CheckpointConfig, TrainerConfig
from harness.data.memory_layout import make_contiguous
from harness.distributed.collectives import Collectives
from harness.distributed.strategies import start
from harness.distributed.topology import strategy_of
from harness.errors import CheckpointError
from tests.checkpoint_hooks import NoHooks
from tests.distributed.saved_models import MODELS, groups_of
from tests.distributed.saving_ranks import become_rank

# What `accelerate launch` makes of configs/accelerate/*.yaml.
_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
# What accelerate's users have who never asked for a version.
_FSDP1 = {
    **{name: value for name, value in _FSDP2.items() if name not in ("FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD")},
    "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
    "FSDP_USE_ORIG_PARAMS": "true",
}
ENVIRONMENT = {
    "single": {},
    "ddp": {},
    "fsdp1": _FSDP1,
    "fsdp2": _FSDP2,
    "hsdp": _FSDP2
    | {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    },
    **{
        f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        for stage in (1, 2, 3)
    },
}


class Queued(torch.optim.Optimizer):
    """Keeps containers of what is sharded, and counters that belong to no parameter."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.01})
        self.total_step = 0
        self.scales = torch.ones(3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        shared: Any = self.state
        shared["num_steps"] = shared.get("num_steps", 0) + 1
        self.total_step += 1
        self.scales = self.scales * 0.9
        factor = shared["num_steps"] + self.total_step + self.scales.sum().item()
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    state = self.state[parameter]
                    queue = state.setdefault("queue", deque(maxlen=2))
                    queue.append(gradient.clone())
                    total, count = state.get("sum", (torch.zeros_like(gradient), 0))
                    state["sum"] = (total + gradient, count + 1)
                    parameter.sub_(queue[0] + state["sum"][0] / (count + 1), alpha=group["lr"] * factor)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total_step": self.total_step, "scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total_step, self.scales = state["total_step"], state["scales"]
        super().load_state_dict(state)


OPTIMIZERS: dict[str, Any] = {
    "Queued": Queued,
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.05),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.05),
}


def become_rank_of(strategy: str, rank: int, world_size: int, port: int) -> None:
    """What `accelerate launch` would have set for a strategy."""
    become_rank(rank, world_size, port)
    os.environ |= ENVIRONMENT[strategy]
    if strategy == "hsdp":
        os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(world_size // 2)
    if strategy == "single":
        # With a launcher's variables it would be DDP, of one rank.
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[variable]


def started(rank: int, world_size: int, port: int, strategy: str, precision: str) -> tuple[Accelerator, Collectives]:
    become_rank_of(strategy, rank, world_size, port)
    accelerator = start(TrainerConfig(mixed_precision=precision), seed=0)  # type: ignore[arg-type]
    assert strategy_of(accelerator) == strategy
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
        # Some weights are kept gathered, some are not; and a group is in several parts.
        plugin.deepspeed_config["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 20,
            "sub_group_size": 40,
        }
    return accelerator, Collectives(rank, world_size, timeout_s=60)


def prepared(accelerator: Accelerator, seed: int, kind: str, num_groups: int, model_name: str = "uneven") -> Watched:
    torch.manual_seed(seed)
    model = MODELS[model_name]()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        make_contiguous(model)  # as `harness train` does
    optimizer = OPTIMIZERS[kind](groups_of(model, num_groups))
    return Watched(*accelerator.prepare(model, optimizer), None)


def train(accelerator: Accelerator, watched: Watched, step: int) -> None:
    """One step on this rank's part of a batch that is the same for any number of ranks."""
    tokens = torch.randint(0, 13, (12, 8), generator=torch.Generator().manual_seed(step))
    mine = tokens[accelerator.process_index :: accelerator.num_processes]
    loss = F.cross_entropy(watched.model(mine).flatten(0, -2).float(), mine.flatten())
    accelerator.backward(loss)
    assert watched.optimizer is not None
    watched.optimizer.step()
    watched.optimizer.zero_grad()


def saver_of(accelerator: Accelerator, collectives: Collectives, directory: Path, **config: Any) -> Saver:
    if collectives.rank == 0:
        directory.mkdir(exist_ok=True)
    collectives.all_gather("the directory", None)
    return Saver(
        accelerator, collectives, CheckpointConfig(when_busy="wait", **config), directory, RunFacts(), NoHooks()
    )


def save_under(
    rank: int,
    world_size: int,
    port: int,
    directory: Path,
    strategy: str,
    precision: str = "fp32",
    kind: str = "AdamW",
    num_groups: int = 2,
    model_name: str = "uneven",
) -> None:
    """Three steps and a save, into `directory`, and another step and save."""
    accelerator, collectives = started(rank, world_size, port, strategy, precision)
    watched = prepared(accelerator, world_size, kind, num_groups, model_name)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    for step in range(1, 5):
        train(accelerator, watched, step)
        if step >= 3:
            saver.save(Moment(f"step-{step}", 0, step, 0, {}))
    saver.close()


def restore_under(
    rank: int,
    world_size: int,
    port: int,
    directory: Path,
    strategy: str,
    names: dict[str, str],
    precision: str = "fp32",
    kind: str = "AdamW",
    num_groups: int = 2,
    model_name: str = "uneven",
) -> None:
    """Restore each of the checkpoints in turn, save what was restored, and again after one step more.

    Args:
        names: of what is saved into `directory` -> path of the checkpoint.
    """
    accelerator, collectives = started(rank, world_size, port, strategy, precision)
    watched = prepared(accelerator, 99, kind, num_groups, model_name)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    for name, path in names.items():
        found = restore_tensors(accelerator, watched, Path(path), collectives)
        state = read_trainer_state(Path(path), read_manifest(Path(path)))
        restore_optimizer_extras(watched.optimizer, state.parts[0].optimizer)
        report = collectives.all_gather("what was read", [found.wanted_bytes, found.read_bytes, list(found.notes)])
        saver.save(Moment(name, 0, 3, 0, {}))
        train(accelerator, watched, 4)
        saver.save(Moment(f"{name}-next", 0, 4, 0, {}))
        saver.wait()
        if rank == 0:
            (directory / f"{name}.json").write_text(json.dumps(report))
    saver.close()


def save_unevenly(rank: int, world_size: int, port: int, directory: Path, steps: int) -> None:
    """A save of a model of which the last layer has had one gradient less, and the scale none at all."""
    accelerator, collectives = started(rank, world_size, port, "single", "fp32")
    watched = prepared(accelerator, world_size, "AdamW", 1)
    assert watched.optimizer is not None
    for step in range(steps):
        loss = sum(p.square().sum() for name, p in watched.model.named_parameters() if not _is_late(name, step))
        accelerator.backward(loss)
        watched.optimizer.step()
        watched.optimizer.zero_grad()
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    saver.save(Moment("saved", 0, steps, 0, {}))
    saver.close()


def _is_late(name: str, step: int) -> bool:
    return name == "scale" or (name.startswith("blocks.2.") and step == 0)


def restore_weights_under(
    rank: int, world_size: int, port: int, directory: Path, strategy: str, path: str, precision: str
) -> None:
    """Weights only, after a step of training; then they are saved, with their masters, and no other state."""
    accelerator, collectives = started(rank, world_size, port, strategy, precision)
    watched = prepared(accelerator, 99, "SGD", 1)
    train(accelerator, watched, 4)
    found = restore_tensors(accelerator, Watched(watched.model, None, None), Path(path), collectives, weights_only=True)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    saver.save(Moment("restored", 0, 1, 0, {}))
    saver.close()
    if rank == 0:
        (directory / "notes.json").write_text(json.dumps(found.notes))


def begin_with_weights_under(rank: int, world_size: int, port: int, directory: Path, strategy: str, path: str) -> None:
    """A GPT-2 takes its weights from a directory of transformers'; then they are saved, with their masters."""
    accelerator, collectives = started(rank, world_size, port, strategy, "fp32")
    watched = prepared(accelerator, 99, "SGD", 1, "gpt2")
    restore_weights(accelerator, watched, Path(path), collectives)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    saver.save(Moment("begun", 0, 1, 0, {}))
    saver.close()


def fail_to_restore(
    rank: int, world_size: int, port: int, directory: Path, strategy: str, paths: list[str], model_name: str
) -> None:
    """What is said on each rank; each reads a path of its own, or all the same."""
    accelerator, collectives = started(rank, world_size, port, strategy, "fp32")
    watched = prepared(accelerator, 99, "AdamW", 1, model_name)
    said = "nothing"
    try:
        restore_tensors(accelerator, watched, Path(paths[min(rank, len(paths) - 1)]), collectives)
    except CheckpointError as error:
        said = str(error)
    # No state is left that a failed attempt has made.
    assert not innermost(watched.optimizer).state
    (directory / f"said-{rank}").write_text(said)
