from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.models import infer_signature as mlflow_infers
from mlflow.models.signature import ModelSignature
from torch import Tensor, nn

from harness.config.schema import ClassSpec
from harness.data import rng_state
from harness.errors import ConfigError
from harness.models.model_spec import check_spec, infer_signature, make_model_spec
from harness.tasks import ByteLM, Digits

CPU = torch.device("cpu")


class Counts(nn.Module):
    """Draws, counts its calls in a buffer, and gives several things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        self.calls += 1
        noise = torch.rand(()) + float(np.random.rand())
        return {"logits": self.layer(x) * mask + noise, "half": self.layer(x).to(torch.bfloat16), "cache": None}


def schema(found: Mapping[str, Any]) -> ModelSignature:
    return ModelSignature.from_dict({name: json.dumps(specs) for name, specs in found["signature"].items()})


def test_signature_equals_mlflows_when_inferred_from_an_example() -> None:
    task = Digits()
    model, images = task.model(), task.input_example()
    found = infer_signature(model, task.input_example)
    assert schema(found) == mlflow_infers(images.numpy(), model.eval()(images).detach().numpy())
    assert np.array_equal(np.array(found["example"], dtype=np.float32), images.numpy())


def test_state_is_unchanged_when_a_signature_is_inferred() -> None:
    model = Counts()
    example = {"x": torch.ones(4, 3), "mask": np.ones((4, 2), dtype=np.float32)}
    before = rng_state.encode(rng_state.capture(CPU))
    found = infer_signature(model, example)
    assert rng_state.encode(rng_state.capture(CPU)) == before
    assert int(model.calls) == 0
    assert [module.training for module in model.modules()] == [True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert str(schema(found).inputs) == "['x': Tensor('float32', (-1, 3)), 'mask': Tensor('float32', (-1, 2))]"
    # numpy has no bfloat16, and None is no tensor.
    assert str(schema(found).outputs) == ("['logits': Tensor('float32', (-1, 2)), 'half': Tensor('float32', (-1, 2))]")


def test_axes_have_any_size_when_the_task_names_them() -> None:
    task = ByteLM(d_model=16, num_layers=1)
    found = schema(infer_signature(task.model(), task.input_example(), task.dynamic_axes()))
    assert [spec.shape for spec in (*found.inputs.inputs, *found.outputs.inputs)] == [(-1, -1), (-1, -1, 256)]


@pytest.mark.parametrize(
    ("example", "axes", "reason"),
    [
        (torch.ones(2, 4), None, "mat1 and mat2"),
        (torch.tensor(1.0), None, "with at least one axis"),
        (torch.ones(2, 3), {"input": [2]}, "has no axis 2"),
        (torch.ones(2, 3), {"x": [1]}, "in 'x'"),
        (lambda: None, None, "there is no example"),
    ],
)
def test_model_is_unchanged_when_it_raises(example: Any, axes: Any, reason: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout())
    with pytest.raises((ValueError, RuntimeError), match=reason):
        infer_signature(model, example, axes)
    assert all(module.training for module in model.modules())


def test_lazy_model_is_refused_when_shapes_are_unknown() -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="before its first batch"):
        infer_signature(model, torch.ones(2, 3))


def test_secrets_are_redacted_when_arguments_are_stored() -> None:
    spec = ClassSpec("harness.tasks.Digits", {"width": 8, "api_key": "abc", "data": {"url": "s3://me:abc@host/x"}})
    model_spec = make_model_spec(spec, nn.Linear(1, 1))
    assert model_spec["init_args"] == {"width": 8, "api_key": "***", "data": {"url": "s3://me:***@host/x"}}
    assert model_spec["model_class"] == "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ClassSpec("__main__.Net"), "only be imported by this script"),
        (ClassSpec("harness.tasks.Digitz"), "did you mean harness.tasks.Digits"),
        (ClassSpec("harness.tasks.Digits", {"width": object()}), "must be numbers, text"),
    ],
)
def test_class_is_refused_when_it_cannot_be_imported_elsewhere(spec: ClassSpec, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_spec("describe", spec)
