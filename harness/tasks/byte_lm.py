"""Train a language model over bytes, a GPT in plain torch, on the text files of a directory.

The default text is the source of Python's standard library, which every machine has. Parameters by size:

    d_model 128,  num_layers 4    1 M
    d_model 512,  num_layers 8    25 M
    d_model 2048, num_layers 20   1 B

Suffixes of tensors name their dimensions: B batch, T time, D model, H heads, d model dimension of one head.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from harness.config.task import StepOutput
from harness.errors import DataError

_NUM_BYTES = 256


class Block(nn.Module):
    """Applies attention and a feed-forward layer, each after a normalisation."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1 = nn.LayerNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)
        self.norm_2 = nn.LayerNorm(d_model)
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Apply the block; shape (B, T, D) in and out."""
        size_B, size_T, size_D = x_BTD.shape
        qkv = self.qkv(self.norm_1(x_BTD)).view(size_B, size_T, 3, self.num_heads, size_D // self.num_heads)
        q_BHTd, k_BHTd, v_BHTd = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q_BHTd, k_BHTd, v_BHTd, is_causal=True)
        x_BTD = x_BTD + self.out(mixed.transpose(1, 2).reshape(size_B, size_T, size_D))
        x_BTD = x_BTD + self.down(F.gelu(self.up(self.norm_2(x_BTD))))
        return x_BTD


class GPT(nn.Module):
    """Predicts the logits of the next byte. Input and output embedding share one tensor."""

    # The classes that FSDP and ZeRO shard as one layer.
    _no_split_modules = ("Block",)

    def __init__(self, d_model: int, num_layers: int, num_heads: int, context_length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(_NUM_BYTES, d_model)
        self.position = nn.Embedding(context_length, d_model)
        self.blocks = nn.ModuleList(Block(d_model, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, _NUM_BYTES, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, bytes_BT: Tensor) -> Tensor:
        """Return logits, shape (B, T, 256)."""
        positions_T = torch.arange(bytes_BT.shape[1], device=bytes_BT.device)
        x_BTD = self.embed(bytes_BT) + self.position(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits


class ByteWindows(Dataset[Tensor]):
    """Windows of `length` bytes over one text, `stride` bytes apart."""

    def __init__(self, text: Tensor, length: int, stride: int) -> None:
        self.text = text
        self.length = length
        self.stride = stride

    def __len__(self) -> int:
        return max(0, (len(self.text) - self.length) // self.stride + 1)

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.stride
        return self.text[start : start + self.length].long()


class ByteLM:
    """Predict the next byte.

    Args:
        text_dir: directory of text files; null: the Python standard library.
        pattern: of the files' names, at any depth.
        max_text_bytes: length at which the text is cut; null: no limit.
        context_length: bytes in the model's context.
        d_model: width of the model.
        num_layers: number of blocks.
        num_heads: attention heads per block.
        batch_size: windows per batch and process.
    """

    def __init__(
        self,
        text_dir: str | None = None,
        pattern: str = "*.py",
        max_text_bytes: int | None = 4_000_000,
        context_length: int = 128,
        d_model: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        batch_size: int = 16,
    ) -> None:
        if d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
        self.text_dir = Path(text_dir or sysconfig.get_paths()["stdlib"])
        self.pattern = pattern
        self.max_text_bytes = max_text_bytes
        self.context_length = context_length
        self.d_model, self.num_layers, self.num_heads = d_model, num_layers, num_heads
        self.batch_size = batch_size

    def model(self) -> nn.Module:
        """Construct the GPT of the configured size."""
        return GPT(self.d_model, self.num_layers, self.num_heads, self.context_length)

    def train_data(self) -> DataLoader[Any]:
        """Return shuffled windows of the first nine tenths of the text."""
        text = self._text()
        return self._loader(text[: len(text) * 9 // 10], shuffle=True)

    def eval_data(self) -> DataLoader[Any]:
        """Return windows of the last tenth of the text."""
        text = self._text()
        return self._loader(text[len(text) * 9 // 10 :], shuffle=False)

    def step(self, model: nn.Module, batch: Tensor) -> StepOutput:
        """Compute the cross entropy of each next byte, and bits per byte, from bytes of shape (B, T + 1)."""
        logits = model(batch[:, :-1])
        targets = batch[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return StepOutput(loss, weight=targets.numel(), metrics={"bits_per_byte": loss.detach() / math.log(2)})

    def input_example(self) -> Tensor:
        """Return the start of a line, from which MLflow infers the model's signature."""
        return torch.tensor([list(b"def main("[: self.context_length])])

    def dynamic_axes(self) -> dict[str, list[int]]:
        """Allow text of any length up to the context's in the signature."""
        return {"input": [1]}

    def _loader(self, text: Tensor, shuffle: bool) -> DataLoader[Any]:
        windows = ByteWindows(text, self.context_length + 1, self.context_length)
        return DataLoader(windows, self.batch_size, shuffle=shuffle, drop_last=shuffle)

    def _text(self) -> Tensor:
        content = bytearray()
        for path in sorted(self.text_dir.rglob(self.pattern)):
            # Installed packages differ between machines.
            if "site-packages" not in path.parts and path.is_file():
                content += path.read_bytes()
            if self.max_text_bytes is not None and len(content) >= self.max_text_bytes:
                break
        if not content:
            raise DataError(f"text_dir: {self.text_dir} has no file {self.pattern}; use another directory")
        return torch.frombuffer(content[: self.max_text_bytes], dtype=torch.uint8)
