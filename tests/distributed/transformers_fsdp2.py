"""One rank of a loop under FSDP2 that trains a small model of transformers: whole, and in two parts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from harness import CheckpointConfig, PeriodicLogger, TrackingConfig
from harness.distributed import strategies
from harness.distributed.model_preparation import separate_embeddings

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {"vocab_size": 64, "max_position_embeddings": 16, **SIZES}
T5 = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **T5)),
}


def sample(kind: str, number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 64, (8,), generator=generator)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": ids[0] % 3}
    return {"input_ids": ids, "labels": ids[0] % 2 if kind == "bert" else ids}


def train(accelerator: Accelerator, kind: str, run_name: str, max_steps: int | None = None) -> list[torch.Tensor]:
    """Two epochs of four steps; all parameters and moments at the end, whole."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    separate_embeddings(accelerator, model)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader: Any = DataLoader([sample(kind, number) for number in range(16)], batch_size=2)  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with PeriodicLogger(
        accelerator,
        1,
        run_name=run_name,
        checkpoint=CheckpointConfig(every_n_steps=2, when_busy="wait"),
        tracking=TrackingConfig(enabled=False),
    ) as logger:
        logger.watch(model, optimizer)
        for _ in logger.epochs(2, max_steps):
            for batch in logger.batches(loader):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    found = [*model.parameters(), *(each for state in optimizer.state.values() for each in state.values())]
    return [each.detach().full_tensor() if isinstance(each, DTensor) else each.detach() for each in found]


kind = sys.argv[1]
accelerator = Accelerator(**strategies.with_cpu_strategies({}))
whole = train(accelerator, kind, "whole")
train(accelerator, kind, "cut", max_steps=3)
resumed = train(accelerator, kind, "cut")
assert len(whole) == len(resumed) and all(map(torch.equal, whole, resumed))
print(f"{kind}: {len(whole)} tensors are equal")
