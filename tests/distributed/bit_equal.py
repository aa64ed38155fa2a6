"""A run that saves with the engine while it trains, and beside it gathers the same moment, the slow way.

accelerate launch ... -m tests.distributed.bit_equal OUT MODEL,MODEL,... NUM_GROUPS [TRANSPORT]
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.config.schema import TrainerConfig
from harness.data.memory_layout import make_contiguous
from harness.distributed.strategies import start
from harness.distributed.topology import strategy_of
from tests.distributed.gathered import gather_state
from tests.distributed.restoring_ranks import become_rank_of
from tests.distributed.saved_models import MODELS, groups_of, logits_of

# Of each the checkpoint is compared; after another, the weights are written outside a step while it is copied.
STEPS = (3, 4, 5, 7)
TORN_STEP = 6


def double_weights(model: torch.nn.Module) -> None:
    """On every rank, of every strategy, uncounted by autograd."""
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter)
        getattr(part, "_local_tensor", part).data.mul_(2)


def save_all(
    rank: int,
    world_size: int,
    port: int,
    out: Path,
    strategy: str,
    models: str,
    num_groups: int,
    transport: str,
) -> None:
    """One rank: each of the models in turn."""
    become_rank_of(strategy, rank, world_size, port)
    accelerator = start(TrainerConfig(mixed_precision="fp32"), seed=0)
    assert strategy_of(accelerator) == strategy
    for name in models.split(","):
        save_and_gather(accelerator, out / name, name, num_groups, transport)
        accelerator.free_memory()


def save_and_gather(accelerator: Any, out: Path, name: str, num_groups: int, transport: Any = "auto") -> None:
    set_seed(1)
    model = MODELS[name]()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        make_contiguous(model)  # as `harness train` does
    optimizer = torch.optim.AdamW(groups_of(model, num_groups), lr=0.05)
    loader = DataLoader(torch.randint(0, 13, (128, 8)), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    checkpoint = CheckpointConfig(every_n_epochs=None, save_last=False, when_busy="wait", transport=transport)
    with PeriodicLogger(
        accelerator, None, run_dir=out, run_name="it", checkpoint=checkpoint, tracking=TrackingConfig(enabled=False)
    ) as logger:
        logger.watch(model, optimizer)
        held = threading.Event()
        for _ in logger.epochs(1):
            for batch in logger.batches(loader):
                if logger.step == TORN_STEP:
                    double_weights(model)
                    held.set()
                logits = logits_of(model(batch))
                loss = F.cross_entropy(logits.flatten(0, -2).float(), batch.flatten())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                logger.log({"train/loss": loss}, len(batch))
                # The step that has just been taken is counted when the next batch is asked for.
                step = logger.step + 1
                if step == TORN_STEP:
                    # The copy begins when the weights are written again.
                    logger._checkpoints.saver._runner.submit(
                        lambda: None if held.wait(60) else print("nothing was written")
                    )
                    assert logger.save()
                elif step in STEPS:
                    expected = gather_state(accelerator, model, optimizer, has_groups=num_groups == 1)
                    assert logger.save()
                    # The copy goes on while the next batch is trained on.
                    if accelerator.is_main_process:
                        # Counted, and so saved, when the next batch is asked for.
                        directory = out / "expected" / f"step-{step:08d}"
                        directory.mkdir(parents=True)
                        metadata = {**expected.aliases, "format": "pt"}
                        save_file(expected.model, directory / "model.safetensors", metadata)
                        if expected.optimizer:
                            save_file(expected.optimizer, directory / "optimizer.safetensors", {"format": "pt"})
