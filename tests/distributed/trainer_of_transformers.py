"""A `transformers.Trainer` of a tiny GPT-2 with tied weights on this project's own text.

argv: ``train``, under DDP, FSDP2 and then FSDP1; ``zero``, under ZeRO-2 and then ZeRO-3; or ``fail``: under DDP, rank 1
raises at the end of the second epoch. Leaves ``<strategy>-<epoch>.pt``: what the Trainer itself would save then.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from harness.distributed import cpu_strategies
from harness.integrations.transformers import HarnessCallback

LENGTH = 16
TEXT = (Path(__file__).resolve().parents[2] / "README.md").read_bytes()
FAILS = sys.argv[1] == "fail"


class Text(Dataset[Any]):
    def __len__(self) -> int:
        return 61  # the last batch is a small one

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.tensor(list(TEXT[index * LENGTH : (index + 1) * LENGTH]))
        return {"input_ids": tokens, "labels": tokens}


def whole_state(trainer: Trainer) -> dict[str, Any]:
    model = trainer.model_wrapped
    if isinstance(model, FullyShardedDataParallel):
        # As accelerate, but without the offloading to a CPU, with which torch 2.13 crashes on one.
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    found: dict[str, Any] = trainer.accelerator.get_state_dict(model)
    return found


class Keep(TrainerCallback):
    trainer: Trainer

    def __init__(self, name: str) -> None:
        self.name = name

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        whole = whole_state(self.trainer)
        if state.is_world_process_zero:
            kept = {name: tensor.clone() for name, tensor in whole.items()}
            torch.save(kept, f"{self.name}-{int(state.epoch)}.pt")
        if FAILS and state.epoch == 2 and args.process_index == 1:
            raise RuntimeError("the disk of this rank fell out")


def train(name: str, deepspeed: dict[str, Any] | None = None) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    arguments = TrainingArguments(
        "out",
        num_train_epochs=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=3,
        save_strategy="no",
        eval_strategy="epoch",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": name in ("fsdp1", "fsdp2")},
    )
    keep = Keep(name)
    keep.trainer = Trainer(
        GPT2LMHeadModel(config),
        arguments,
        train_dataset=Text(),
        eval_dataset=Text(),
        callbacks=[keep, HarnessCallback(2, run_name=name)],
    )
    keep.trainer.train()


def with_zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


if __name__ == "__main__" and sys.argv[1] == "zero":
    cpu_strategies.prepare_deepspeed()
    for stage in (2, 3):
        train(f"zero{stage}", with_zero(stage))
elif __name__ == "__main__":
    fsdp = ("ACCELERATE_USE_FSDP", "FSDP_")
    asked = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(fsdp)}
    train("ddp")
    first_version = {
        "FSDP_VERSION": "1",
        "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD",
        "FSDP_USE_ORIG_PARAMS": "true",
    }
    for name, more in (("fsdp2", {}), ("fsdp1", first_version)):
        os.environ.update(asked | more)
        # Stock accelerate would run DDP again on a CPU, without a word.
        AcceleratorState._reset_state(True)
        cpu_strategies.prepare_fsdp("no", InitProcessGroupKwargs())
        train(name)
