"""A lightning Trainer on two CPU processes under each strategy in turn; Lightning starts the other rank itself.

Leaves ``<strategy>.pt``: the weights at the end, gathered by torch or by DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

from harness.distributed import cpu_strategies
from harness.integrations.lightning import HarnessCallback
from tests.local.integrations.digits_module import DigitsModule, ShardedDigits


class DeepSpeedOnCpu(DeepSpeedStrategy):
    """Lightning has it for CUDA alone: what asks for that is left out, all else is its own."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Fsdp1OnCpu(FSDPStrategy):
    """Lightning has it for CUDA alone: it names the device by a number, which a CPU has not. All else is its own."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(
            model, sharding_strategy=self.sharding_strategy, device_id=torch.device("cpu"), **self.kwargs
        )


def gathered(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    if isinstance(trainer.strategy, FSDPStrategy):
        # Without `cpu_offload`, with which torch 2.13 crashes on a CPU: it frees what it has not copied.
        return get_model_state_dict(trainer.strategy.model, options=StateDictOptions(full_state_dict=True))
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.clone() for name, tensor in module.state_dict().items()}


STRATEGIES = {
    "ddp": (DigitsModule, DDPStrategy(process_group_backend="gloo")),
    "fsdp2": (
        ShardedDigits,
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
    ),
    "fsdp1": (DigitsModule, Fsdp1OnCpu(process_group_backend="gloo", auto_wrap_policy={nn.Conv2d, nn.Linear})),
    "zero2": (DigitsModule, DeepSpeedOnCpu(stage=2, process_group_backend="gloo")),
    "zero3": (DigitsModule, DeepSpeedOnCpu(stage=3, process_group_backend="gloo")),
}
cpu_strategies.prepare_deepspeed()

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
        callbacks=[HarnessCallback(2, run_name=name)],
    )
    module = kind(width=4)
    trainer.fit(module)
    whole = gathered(trainer, module)
    if trainer.is_global_zero:
        torch.save(whole, f"{name}.pt")
