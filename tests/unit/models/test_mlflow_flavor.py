from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor, nn

import harness
from harness.checkpoint.format.names import named_state
from harness.config.schema import ClassSpec
from harness.errors import CheckpointError, ConfigError
from harness.models.mlflow_flavor import PyFuncModel
from harness.models.model_spec import make_model_spec
from harness.tasks import ByteLM
from harness.tracking.mlflow.mlmodel import model_files

LM = ClassSpec("harness.tasks.ByteLM", {"d_model": 16, "num_layers": 1, "context_length": 8})
RECORD = {"key": "k", "epoch": 1, "step": 2, "files": ["model.safetensors", "manifest.json"], "time_ms": 1}


@pytest.fixture
def publish(make_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """A checkpoint of a model with the files that MLflow has beside it."""

    def publish(model: nn.Module, spec: ClassSpec | None, **more: Any) -> Path:
        state = named_state(model)
        tensors = {name: tensor.detach() for name, tensor in {**state.parameters, **state.buffers}.items()}
        path = make_checkpoint(tensors, aliases=state.aliases, **more)
        for name, text in model_files(make_model_spec(spec, model), RECORD, "m-1", "r-1").items():
            (path / name).write_text(text)
        return path

    return publish


@pytest.mark.parametrize("max_shard_size_bytes", [None, 4000])
def test_tied_model_is_equal_when_loaded(publish: Callable[..., Path], max_shard_size_bytes: int | None) -> None:
    trained = ByteLM(**LM.init_args).model()
    nn.init.normal_(trained.embed.weight)
    loaded = harness.load_model(publish(trained, LM, max_shard_size_bytes=max_shard_size_bytes))
    assert loaded.head.weight is loaded.embed.weight
    for name, tensor in trained.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not loaded.training


def test_own_model_is_filled_when_the_spec_has_no_class(publish: Callable[..., Path]) -> None:
    trained = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    trained[1].running_mean.fill_(5)
    path = publish(trained, None)
    assert "python_function" not in yaml.safe_load((path / "MLmodel").read_text())["flavors"]
    with pytest.raises(ConfigError, match=r"the model spec of this .* has no class"):
        harness.load_model(path)
    mine = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    assert harness.load_model(path, model=mine) is mine
    assert torch.equal(mine[1].running_mean, torch.full((2,), 5.0))


class Tied(nn.Module):
    def __init__(self, *, tie: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        if tie:
            self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            nn.Sequential(nn.Linear(2, 2)),
            "has no 0.weight, 0.bias, and has a.weight, b.weight, which the model lacks",
        ),
        (Tied(tie=True), "has separate b.weight and a.weight, which are tied in the model"),
        (nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 2, bias=False)}), r"has shape \[2, 2\] in"),
    ],
    ids=["names", "ties", "shapes"],
)
def test_weights_are_refused_when_of_another_model(publish: Callable[..., Path], model: nn.Module, reason: str) -> None:
    path = publish(Tied(tie=False), None)
    with pytest.raises(CheckpointError, match=reason):
        harness.load_model(path, model=model)


def test_tied_weights_are_copied_when_the_model_has_two(publish: Callable[..., Path]) -> None:
    trained = Tied(tie=True)
    mine = harness.load_model(publish(trained, None), model=Tied(tie=False))
    assert torch.equal(mine.a.weight, trained.a.weight)
    assert torch.equal(mine.b.weight, trained.a.weight)


def test_weights_are_refused_when_a_byte_differs(publish: Callable[..., Path]) -> None:
    path = publish(Tied(tie=False), None)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="are not what was written"):
        harness.load_model(path, model=Tied(tie=False))


@pytest.mark.parametrize(
    ("class_path", "reason"),
    [
        ("subprocess.Popen", "is neither a torch.nn.Module nor a harness.Task"),
        ("nowhere_at_all.Net", "cannot import 'nowhere_at_all'"),
    ],
)
def test_nothing_is_called_when_the_class_has_no_model(
    publish: Callable[..., Path], tmp_path: Path, class_path: str, reason: str
) -> None:
    path = publish(Tied(tie=False), ClassSpec(class_path, {"args": ["touch", str(tmp_path / "called")]}))
    with pytest.raises(ConfigError, match=reason):
        harness.load_model(path)
    assert not (tmp_path / "called").exists()


def test_error_has_place_and_remedy_when_the_spec_is_missing(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_checkpoint({"w": torch.ones(2)})
    with pytest.raises(ConfigError, match="has no model spec; pass the model to fill"):
        harness.load_model(path)
    with pytest.raises(ConfigError, match="is not a directory"):
        harness.load_model(tmp_path / "nowhere")


class Sums(nn.Module):
    """Says what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return x * self.weight if y is None else (x + y, x.sum())


@pytest.mark.parametrize(
    "data",
    [
        np.array([[1, 2], [3, 4]], dtype=np.float64),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        pd.DataFrame({"a": [1.0, 3.0], "b": [2.0, 4.0]}),
        pd.DataFrame({"cells": [[1.0, 2.0], [3.0, 4.0]]}),
        [[1.0, 2.0], [3.0, 4.0]],
        {"x": np.array([[1.0, 2.0], [3.0, 4.0]])},
    ],
    ids=["array", "tensor", "frame", "frame of lists", "lists", "mapping"],
)
def test_prediction_is_an_array_when_given_numbers(data: Any) -> None:
    found = PyFuncModel(Sums()).predict(data)
    assert (found.tolist(), found.dtype) == ([[1, 2], [3, 4]], np.float32)


def test_prediction_is_named_when_outputs_are_several() -> None:
    read_only = np.arange(3)
    read_only.flags.writeable = False
    found: Mapping[str, Any] = PyFuncModel(Sums()).predict({"x": read_only, "y": np.ones(3, dtype=np.int64)})
    assert {name: value.tolist() for name, value in found.items()} == {"output_0": [1, 2, 3], "output_1": 3}


def test_text_is_refused_when_numbers_are_expected() -> None:
    with pytest.raises(ValueError, match="input must be numbers"):
        PyFuncModel(Sums()).predict(["a", "b"])


def test_files_are_equal_when_written_again() -> None:
    model_spec = json.loads(json.dumps(make_model_spec(LM, ByteLM(**LM.init_args).model())))
    assert model_files(model_spec, RECORD, "m-1", "r-1") == model_files(model_spec, RECORD, "m-1", "r-1")
