"""Ranks that save under one way of FSDP1's, and go on under it with what another way has saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import harness
from harness.checkpoint.format.names import unwrapped
from harness.checkpoint.restore.restore import restore_tensors
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.distributed.collectives import Collectives
from harness.errors import CheckpointError
from harness.models.model_spec import infer_signature
from harness.tracking.provenance import model_summary
from tests.distributed.restoring_ranks import saver_of, started, train
from tests.distributed.saved_models import Block, Uneven
from tests.distributed.saving_ranks import become_rank

# A model of 16 bits: accelerate makes 32 of them in the flat parameters, which their views follow in the first forward.
UPCAST = "as accelerate wraps it"


def wrapped(way: str, seed: int) -> nn.Module:
    """A model in FSDP1's own hands, as ``HYBRID_SHARD flat bf16`` says it."""
    strategy, of_what, precision = way.split()
    torch.manual_seed(seed)
    model = Uneven()
    # Without the original parameters FSDP1 wants all of them trained, or none.
    model.frozen.requires_grad_(of_what == "flat" or precision == "all")
    kinds = MixedPrecision(torch.bfloat16, torch.float32) if precision == "bf16" else None
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if "HYBRID" in strategy else None
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=of_what == "views",
        mixed_precision=kinds,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
    )


def prepared(accelerator: Accelerator, way: str, seed: int) -> Watched:
    if way == UPCAST:
        torch.manual_seed(seed)
        model: nn.Module = Uneven().to(torch.bfloat16)
    else:
        model = wrapped(way, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return Watched(*accelerator.prepare(model, optimizer), None)


def look_at(watched: Watched, way: str) -> None:
    """An evaluation, by somebody who has not turned gradients off: FSDP1 may keep what it has gathered.

    Not as accelerate wraps it: there torch itself has other gradients in the step after such a forward.
    """
    if way != UPCAST:
        watched.model(torch.zeros(2, 8, dtype=torch.long))


def check_what_is_said_of(model: nn.Module) -> None:
    """Its size is the whole one's, and it is not run on rank zero alone, which would wait for the others."""
    size = sum(parameter.numel() for parameter in Uneven().parameters())
    assert f" {size:,} " in model_summary(unwrapped(model), model).splitlines()[1]
    with pytest.raises(ValueError, match="already sharded"):
        infer_signature(model, torch.zeros(2, 8, dtype=torch.long))


def say_what_is_refused(rank: int, world_size: int, port: int, directory: Path) -> None:
    """What each rank says to an optimizer that trains nothing, another order of elements, a state of its own kind."""
    accelerator, _ = started(rank, world_size, port, "fsdp1", "fp32")

    def said(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
        with pytest.raises(CheckpointError) as refused:
            find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)
        return str(refused.value)

    early = torch.optim.SGD(Uneven().parameters(), lr=0.1)
    turned = nn.Conv2d(3, 7, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    factored = wrapped("FULL_SHARD views all", 1)
    optimizer = torch.optim.SGD(factored.parameters(), lr=0.1)
    for parameter in factored.parameters():
        optimizer.state[parameter]["rows"] = torch.zeros(parameter.numel() + 2)
    lines = [
        said(wrapped("FULL_SHARD flat all", 1), early),
        said(FullyShardedDataParallel(turned, device_id=torch.device("cpu"), use_orig_params=True), None),
        said(factored, optimizer),
    ]
    directory.joinpath(f"said-{rank}").write_text("\n".join(lines))


def prepare_as_a_script(rank: int, world_size: int, port: int, directory: Path) -> None:
    """A script with a plugin of its own, whose ranks have made weights of their own; those that they train with."""
    become_rank(rank, world_size, port)
    harness.autolog()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, sharding_strategy="SHARD_GRAD_OP", use_orig_params=True)
    accelerator = Accelerator(fsdp_plugin=plugin)
    assert accelerator.state.fsdp_plugin is plugin
    torch.manual_seed(rank)
    model = accelerator.prepare(nn.Linear(3, 2))
    with FullyShardedDataParallel.summon_full_params(model):
        torch.save([parameter.detach().clone() for parameter in model.parameters()], directory / f"weights-{rank}.pt")


def go_through(rank: int, world_size: int, port: int, directory: Path, ways: list[str], source: str) -> None:
    """Each way trains and saves; then it reads what the first one, or `source`, has saved, and goes on with that."""
    accelerator, collectives = started(rank, world_size, port, "fsdp1", "bf16" if ways == [UPCAST] else "fp32")
    for way in ways:
        save(accelerator, collectives, directory / way, way)
    for way in ways:
        read(accelerator, collectives, directory / way, way, Path(source or directory / ways[0]) / "step-3")


def save(accelerator: Accelerator, collectives: Collectives, directory: Path, way: str) -> None:
    watched = prepared(accelerator, way, 1)
    check_what_is_said_of(watched.model)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    for step in range(1, 5):
        train(accelerator, watched, step)
        if step >= 3:
            look_at(watched, way)
            saver.save(Moment(f"step-{step}", 0, step, 0, {}))
    saver.close()
    accelerator.free_memory()


def read(accelerator: Accelerator, collectives: Collectives, directory: Path, way: str, checkpoint: Path) -> None:
    watched = prepared(accelerator, way, 99)
    look_at(watched, way)
    restore_tensors(accelerator, watched, checkpoint, collectives)
    saver = saver_of(accelerator, collectives, directory)
    saver.check(watched)
    optimizer: Any = watched.optimizer
    assert {tensor.dtype for tensor in optimizer.optimizer.state} == {torch.float32}
    # As if it had stepped so far itself: of what a rank has nothing, it has no state either.
    assert all(tensor.numel() for tensor in optimizer.optimizer.state)
    saver.save(Moment("read", 0, 3, 0, {}))
    train(accelerator, watched, 4)
    look_at(watched, way)
    saver.save(Moment("read-next", 0, 4, 0, {}))
    saver.close()
    accelerator.free_memory()
