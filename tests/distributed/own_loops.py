"""Ranks with a loop of their own over loaders of each kind that accelerate makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.config.schema import TrainerConfig
from harness.distributed.strategies import start
from harness.errors import PeerFailure
from tests.distributed.restoring_ranks import become_rank_of
from tests.distributed.saving_ranks import become_rank

NUM_SAMPLES = 48
BATCH_SIZE = 4
STEP_OF_CHECKPOINT = 4


class Numbered(Dataset[Any]):
    """Samples that tell their index."""

    def __init__(self, num_samples: int = NUM_SAMPLES) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.full((3,), index / NUM_SAMPLES)


class Stream(IterableDataset[Any]):
    """The same without an index."""

    def __iter__(self) -> Iterator[Any]:
        return (Numbered()[index] for index in range(NUM_SAMPLES))


class Buckets:
    """Batches of indices, and no size."""

    batch_size = None

    def __len__(self) -> int:
        return NUM_SAMPLES // BATCH_SIZE

    def __iter__(self) -> Iterator[list[int]]:
        return iter([list(range(first, first + BATCH_SIZE)) for first in range(0, NUM_SAMPLES, BATCH_SIZE)])


# Kind of loader -> how accelerate is to prepare it.
KINDS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "split": {"split_batches": True},
    "dispatched": {"dispatch_batches": True},
    "iterable": {},
    "iterable_sharded": {"dispatch_batches": False},
    "batch_sampler": {"even_batches": False},
}


def _loader(kind: str) -> Any:
    if kind.startswith("iterable"):
        return DataLoader(Stream(), BATCH_SIZE)
    if kind == "batch_sampler":
        return DataLoader(Numbered(), batch_sampler=Buckets())  # type: ignore[arg-type]
    return DataLoader(Numbered(), BATCH_SIZE, shuffle=True)


class Crash(Exception):
    pass


def train_on(rank: int, world_size: int, port: int, directory: Path, kind: str, crashes: bool) -> None:
    """Two epochs, or until the step after a checkpoint; which samples each rank had, by epoch."""
    become_rank(rank, world_size, port)
    set_seed(1)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**KINDS[kind]))
    model: Any = nn.Linear(3, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, _loader(kind))
    seen: list[tuple[int, list[int]]] = []
    try:
        with PeriodicLogger(
            accelerator,
            None,
            run_name="run",
            run_dir=directory,
            checkpoint=CheckpointConfig(every_n_steps=STEP_OF_CHECKPOINT, when_busy="wait", save_last=False),
            tracking=TrackingConfig(enabled=False, log_every_n_steps=1),
        ) as logger:
            logger.watch(model, optimizer)
            for epoch in logger.epochs(2):
                for indices, inputs in logger.batches(loader):
                    loss = model(inputs).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    logger.log({"train/loss": loss}, weight=len(inputs))
                    if crashes and logger.step == STEP_OF_CHECKPOINT:
                        raise Crash
                    seen.append((epoch, indices.tolist()))
    except (Crash, PeerFailure):
        pass
    name = "cut" if crashes else "resumed"
    (directory / f"{name}-{rank}.json").write_text(json.dumps(seen))


def evaluate_unevenly(rank: int, world_size: int, port: int, directory: Path) -> None:
    """Evaluations of which one rank has a batch more than the other, while the ranks vote at each batch."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    model: Any = nn.Linear(3, 1)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    model, optimizer, loader, evaluation = accelerator.prepare(
        model, optimizer, DataLoader(Numbered(), BATCH_SIZE), DataLoader(Numbered(20), BATCH_SIZE)
    )
    tracking = TrackingConfig(enabled=False, log_every_n_steps=1)
    num_batches = []
    with PeriodicLogger(accelerator, None, run_name="run", run_dir=directory, tracking=tracking) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(3):
            for _, inputs in logger.batches(loader):
                accelerator.backward(model(inputs).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            logger.events._consensus.every_n_steps = 1
            num_batches.append(0)
            for indices, _ in logger.eval_batches(evaluation):
                num_batches[-1] += 1
                logger.log({"eval/index": indices.float().mean()}, weight=len(indices))
    (directory / f"evaluated-{rank}.json").write_text(json.dumps([num_batches, logger.latest["eval/index"]]))


def fail_twice(rank: int, world_size: int, port: int, directory: Path) -> None:
    """Two runs in the same processes, each of which every rank ends by an error of its own; what ended them."""
    become_rank(rank, world_size, port)
    accelerator = Accelerator(cpu=True)
    causes = []
    for name in ("first", "second"):
        logger = PeriodicLogger(
            accelerator, None, run_name=name, run_dir=directory, tracking=TrackingConfig(enabled=False)
        )
        logger.start()
        causes.append(str(logger.fail(Crash(f"the {name} of rank {rank}"))))
    (directory / f"causes-{rank}.json").write_text(json.dumps(causes))


def train_two_models(rank: int, world_size: int, port: int, directory: Path, strategy: str) -> None:
    """Two epochs of two models in turn, the second one with each second batch; the batch of all ranks is the same."""
    become_rank_of(strategy, rank, world_size, port)
    accelerator = start(TrainerConfig(), seed=0)
    torch.manual_seed(1)
    generator: Any = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    critic: Any = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 1))
    opt_g: Any = torch.optim.AdamW(generator.parameters(), lr=0.01)
    opt_c: Any = torch.optim.RMSprop(critic.parameters(), lr=0.01)
    # FSDP2 takes one model at a time.
    generator, opt_g = accelerator.prepare(generator, opt_g)
    critic, opt_c = accelerator.prepare(critic, opt_c)
    loader: Any = accelerator.prepare(DataLoader(Numbered(), BATCH_SIZE // world_size))
    tracking = TrackingConfig(enabled=False, log_every_n_steps=1)
    checkpoint = CheckpointConfig(when_busy="wait")
    with PeriodicLogger(
        accelerator, 1, run_name="run", run_dir=directory, checkpoint=checkpoint, tracking=tracking
    ) as logger:
        logger.watch({"generator": (generator, opt_g), "critic": (critic, opt_c)}, steps_of="critic")
        for _ in logger.epochs(2):
            for indices, real in logger.batches(loader):
                opt_c.zero_grad()
                accelerator.backward((critic(generator(real.cos()).detach()) - critic(real)).square().mean())
                opt_c.step()
                if (int(indices[0]) // BATCH_SIZE) % 2:
                    opt_g.zero_grad()
                    accelerator.backward((1 - critic(generator(real.cos()))).square().mean())
                    opt_g.step()
    if rank == 0:
        (directory / f"end-{world_size}.json").write_text(json.dumps([logger.step, sorted(logger.latest)]))
