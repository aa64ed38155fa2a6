"""Ranks on the nodes of `tests.nodes.network`, each node in a working directory of its own."""

from __future__ import annotations

import os
from pathlib import Path

from accelerate import Accelerator

from harness.checkpoint.save.hooks import RunFacts
from harness.checkpoint.save.saver import Saver
from harness.checkpoint.state.trainer_state import Moment, Watched
from harness.config.schema import CheckpointConfig, ClassSpec, RunConfig, TrackingConfig, TrainerConfig
from harness.distributed.collectives import Collectives
from harness.errors import HarnessError
from harness.training.app import train
from tests.checkpoint_hooks import NoHooks
from tests.distributed.restoring_ranks import become_rank_of
from tests.distributed.saving_ranks import Counting, Weights, become_rank
from tests.nodes.network import Node


def train_digits(
    rank: int, world_size: int, port: int, nodes: list[Node], directories: list[Path], strategy: str, max_epochs: int
) -> None:
    """Go on with the run of this node's directory up to so many epochs; as many ranks on each node."""
    number = rank * len(nodes) // world_size
    nodes[number].enter()
    os.chdir(directories[number])
    per_node = world_size // len(nodes)
    become_rank_of(strategy, rank, world_size, port)
    os.environ |= {
        "MASTER_ADDR": nodes[0].address,
        "LOCAL_RANK": str(rank % per_node),
        "LOCAL_WORLD_SIZE": str(per_node),
    }
    train(
        RunConfig(
            task=ClassSpec("harness.tasks.Digits", {"batch_size": 64 // world_size}),
            run_dir="runs",
            run_name="run",
            trainer=TrainerConfig(max_epochs=max_epochs, progress_bar=False),
            checkpoint=CheckpointConfig(every_n_epochs=1, when_busy="wait"),
            tracking=TrackingConfig(enabled=False),
        )
    )


def save_all_the_time(
    rank: int,
    world_size: int,
    port: int,
    nodes: list[Node],
    directory: Path,
    num_saves: int,
    timeout_s: float,
) -> None:
    """A rank on each node, which "trains" by adding one to each weight; what it ends with is in ``said-<rank>``."""
    nodes[rank].enter()
    become_rank(rank, world_size, port)
    os.environ["MASTER_ADDR"] = nodes[0].address
    accelerator = Accelerator(cpu=True)
    checkpoints = directory / str(rank) / "checkpoints"
    if rank == 0:
        checkpoints.mkdir(parents=True)
    model = Weights()
    optimizer = Counting(model)
    collectives = Collectives(rank, world_size, timeout_s=120)
    config = CheckpointConfig(when_busy="wait", timeout_s=timeout_s)
    saver = Saver(accelerator, collectives, config, checkpoints, RunFacts(), NoHooks())
    assert saver._runner.context.transport == "gather"  # `auto` has found that they share no disk
    saver.check(Watched(model, optimizer, None))
    said = "done"
    try:
        for step in range(1, num_saves + 1):
            optimizer.step()
            model.steps.fill_(step)
            saver.save(Moment(f"step-{step:08d}", 0, step, 0, {}))
        (directory / f"steps-{rank}").write_text(str(step))
        saver.close()
    except HarnessError as error:
        said = str(error)
    (directory / f"said-{rank}").write_text(said)
    # The connections that a fault has ended are not closed in good order.
    os._exit(0)
