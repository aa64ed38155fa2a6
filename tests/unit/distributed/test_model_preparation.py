"""Which layers of a model FSDP2 shards one by one: none that holds an embedding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from harness.distributed.model_preparation import separate_embeddings
from harness.errors import ConfigError


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)


class Layer(nn.Linear):
    pass


class Model(nn.Module):
    _no_split_modules = ("Embeddings", "Layer")

    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layer, self.head = Embeddings(), Layer(4, 4), nn.Linear(4, 8)
        self.tied, self.scaled = nn.Embedding(8, 4), nn.Embedding(8, 4, padding_idx=0)
        self.tied.weight = self.scaled.weight = self.embeddings.words.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.words


def prepare(layers: list[str] | None, version: int = 2) -> tuple[Any, Model]:
    plugin: Any = FullyShardedDataParallelPlugin(
        fsdp_version=version, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=layers
    )
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    model = Model()
    separate_embeddings(accelerator, model)
    return plugin, model


def test_layers_are_those_without_an_embedding_when_none_are_named() -> None:
    plugin, model = prepare(None)
    assert plugin.transformer_cls_names_to_wrap == ["Layer"]
    names = set(model.state_dict())
    assert names == set(Model().state_dict())
    assert model.tied is model.embeddings.words
    assert model.scaled is not model.embeddings.words
    assert torch.equal(model.scaled.weight, model.tied.weight)


@pytest.mark.parametrize(("layers", "version"), [(["Layer"], 2), (None, 1)])
def test_plugin_is_as_it_was_when_there_is_nothing_to_separate(layers: list[str] | None, version: int) -> None:
    plugin, _ = prepare(layers, version)
    assert plugin.transformer_cls_names_to_wrap == layers


def test_error_names_the_setting_when_a_layer_with_an_embedding_is_named() -> None:
    with pytest.raises(ConfigError, match=r"FSDP_TRANSFORMER_CLS_TO_WRAP: names Embeddings, .* give Layer"):
        prepare(["Embeddings", "Layer"])
