"""A lightning Trainer on two CPU processes, under DDP and then under FSDP2; Lightning starts the other rank itself.

Leaves ``<strategy>.pt``: what the Trainer's own checkpoint has at the end, gathered by torch.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from harness.config import CheckpointConfig
from harness.integrations.lightning import HarnessCallback
from tests.unit.integrations.digits_module import DigitsModule, ShardedDigits

STRATEGIES = {
    "ddp": (DigitsModule, DDPStrategy(process_group_backend="gloo")),
    "fsdp2": (
        ShardedDigits,
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    ),
}

for name, (kind, strategy) in STRATEGIES.items():
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        logger=False,
        log_every_n_steps=2,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[HarnessCallback(2, run_name=name, checkpoint=CheckpointConfig(when_busy="wait"))],
    )
    module = kind(width=4)
    trainer.fit(module)
    whole = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        torch.save(whole, f"{name}.pt")
