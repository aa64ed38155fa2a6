"""`transformers.Trainer` with the harness callback: checkpoints as `from_pretrained` models, metrics in MLflow.

pip install 'harness[transformers]'
python examples/transformers_trainer.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from harness.integrations.transformers import HarnessCallback

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--run_name", default="transformers-trainer")
options = parser.parse_args()

LENGTH = 32
TEXT = Path(__file__).read_bytes()


class Bytes(Dataset[Any]):
    """Windows of this file's bytes."""

    def __len__(self) -> int:
        return len(TEXT) // LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = torch.tensor(list(TEXT[index * LENGTH : (index + 1) * LENGTH]))
        return {"input_ids": tokens, "labels": tokens}


config = GPT2Config(vocab_size=256, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
arguments = TrainingArguments(
    "trainer-output",
    num_train_epochs=options.epochs,
    per_device_train_batch_size=8,
    logging_steps=5,
    save_strategy="no",
    eval_strategy="epoch",
    report_to=[],
    disable_tqdm=True,
)
callback = HarnessCallback(every_n_epochs=2, experiment_name="examples", run_name=options.run_name)
Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Bytes(), eval_dataset=Bytes(), callbacks=[callback]).train()
