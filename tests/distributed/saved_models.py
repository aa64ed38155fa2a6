"""Models whose checkpoints are hard to get right: uneven, tied, frozen, mixed, and other people's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A layer of its own for FSDP2, with no dimension that two or three or four ranks divide evenly."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(size, size + 2, bias=True)
        self.back = nn.Linear(size + 2, size, bias=False)
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.back(F.gelu(self.fc(x))))


class Uneven(nn.Module):
    """Tied embedding, one-row and one-element parameters, a frozen one, buffers of several types."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 5)
        self.blocks = nn.ModuleList([Block(5), Block(5), Block(5)])
        self.again = self.blocks[0]
        # As a slice is: one element may have any stride.
        self.scale = nn.Parameter(torch.ones(12)[::11][1:])
        self.frozen = nn.Parameter(torch.randn(7, 5), requires_grad=False)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("sixteen", torch.arange(5, dtype=torch.bfloat16))
        self.register_buffer("small", torch.tensor(3.5))
        self.register_buffer("nothing", torch.empty(0, 4))
        self.register_buffer("passing", torch.zeros(2), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        self.count += 1
        x = self.embed(tokens) + self.frozen.mean(0)
        for block in self.blocks:
            x = block(x)
        return self.head(x * self.scale)


class Large(Uneven):
    """With a layer of 1.4 MB, whose bytes decide."""

    def __init__(self) -> None:
        super().__init__()
        self.large = nn.Linear(600, 602, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return super().forward(tokens) + self.large(x.repeat(1, 1, 120))[..., :13]


class Convolutional(nn.Module):
    """BatchNorm, whose buffers change in forward."""

    _no_split_modules = ("Conv2d",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 3, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 13)

    def forward(self, tokens: Tensor) -> Tensor:
        images = tokens.float().reshape(-1, 1, 1, 1).expand(-1, 3, 5, 5) + torch.arange(5.0)
        features = self.norm(self.conv(images)).mean((2, 3))
        return self.head(F.relu(features)).reshape(*tokens.shape, 13)


def _channels_last() -> nn.Module:
    """Weights that do not lie in C order. FSDP2 refuses them itself; for DeepSpeed they are put in order."""
    return Convolutional().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


class Eighth(Uneven):
    """With 8-bit floats, which gloo cannot broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eighth", torch.tensor([1.5, 2.0]).to(torch.float8_e4m3fn))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=13, n_positions=8, n_embd=12, n_layer=2, n_head=2))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, max_position_embeddings=8, **sizes))


def _peft() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(_gpt2(), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "uneven": Uneven,
    "large": Large,
    "convolutional": Convolutional,
    "channels_last": _channels_last,
    "eighth": Eighth,
    "gpt2": _gpt2,
    "llama": _llama,
    "peft": _peft,
}


def logits_of(output: Any) -> Tensor:
    """The logits, of our own models or of transformers'."""
    logits: Tensor = getattr(output, "logits", output)
    return logits


def groups_of(model: nn.Module, num_groups: int) -> list[dict[str, Any]]:
    """The trainable parameters in so many groups, in turn, each with a decay of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": trained[index::num_groups], "weight_decay": 0.01 * (index + 1)}
        for index in range(min(num_groups, len(trained)))
    ]
