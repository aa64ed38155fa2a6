from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from harness.checkpoint.gather import gather_state
from harness.errors import CheckpointError


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embed(x)))
        return out


class Odd(torch.optim.SGD):
    """Keeps something that is neither a tensor nor a number."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = ["a"]
        return result


def trained(accelerator: Accelerator, make: type[torch.optim.Optimizer] = torch.optim.AdamW, **values: Any) -> Any:
    torch.manual_seed(0)
    model = Tied()
    model, optimizer = accelerator.prepare(model, make(model.parameters(), **values))
    for _ in range(2):
        model(torch.tensor([0, 1, 2])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_every_tensor_is_there_once_when_weights_are_tied(accelerator: Accelerator) -> None:
    model, _ = trained(accelerator, lr=0.1)
    state = gather_state(accelerator, model, None, dtype=None)
    expected = model.state_dict()
    assert state.aliases == {"head.weight": "embed.weight"}
    assert {*state.model, *state.aliases} == set(expected)
    for name, tensor in state.model.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    assert state.model["norm.num_batches_tracked"].shape == ()
    assert state.model["norm.num_batches_tracked"].item() == 2


def test_moments_have_the_names_of_parameters_when_adam_has_stepped(accelerator: Accelerator) -> None:
    model, optimizer = trained(accelerator, lr=0.1)
    state = gather_state(accelerator, model, optimizer, dtype=None)
    names = ["embed.weight", "norm.weight", "norm.bias"]
    assert set(state.optimizer) == {f"{kind}.{name}" for kind in ("step", "exp_avg", "exp_avg_sq") for name in names}
    inner = optimizer.optimizer.state
    for name in names:
        own = inner[model.get_parameter(name)]
        assert torch.equal(state.optimizer[f"exp_avg.{name}"], own["exp_avg"])
        assert torch.equal(state.optimizer[f"exp_avg_sq.{name}"], own["exp_avg_sq"])
        assert state.optimizer[f"step.{name}"].item() == 2
    (group,) = state.param_groups
    assert group["params"] == names
    assert (group["lr"], tuple(group["betas"])) == (0.1, (0.9, 0.999))


def test_tensors_are_copies_when_training_goes_on(accelerator: Accelerator) -> None:
    model, optimizer = trained(accelerator, lr=0.1)
    state = gather_state(accelerator, model, optimizer, dtype=None)
    before = {name: tensor.clone() for name, tensor in {**state.model, **state.optimizer}.items()}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(7)
        for values in optimizer.optimizer.state.values():
            for value in values.values():
                value.fill_(7)
    for name, tensor in {**state.model, **state.optimizer}.items():
        assert torch.equal(tensor, before[name]), name


def test_tensors_are_contiguous_when_the_model_is_channels_last(accelerator: Accelerator) -> None:
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = gather_state(accelerator, model, None, dtype=None)
    assert not model.weight.is_contiguous()
    assert state.model["weight"].is_contiguous()
    assert torch.equal(state.model["weight"], model.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_alone_are_cast_when_a_dtype_is_given(accelerator: Accelerator, dtype: torch.dtype) -> None:
    model, optimizer = trained(accelerator, lr=0.1)
    state = gather_state(accelerator, model, optimizer, dtype=dtype)
    assert torch.equal(state.model["embed.weight"], model.embed.weight.to(dtype))
    assert state.model["norm.running_var"].dtype == dtype
    assert state.model["norm.num_batches_tracked"].dtype == torch.int64
    assert state.optimizer["exp_avg.embed.weight"].dtype == torch.float32


def test_optimizer_is_left_out_when_not_given_or_not_stepped(accelerator: Accelerator) -> None:
    model = Tied()
    assert gather_state(accelerator, model, None, dtype=None).param_groups == []
    fresh = gather_state(accelerator, model, torch.optim.AdamW(model.parameters(), lr=0.5), dtype=None)
    assert fresh.optimizer == {}
    assert fresh.param_groups[0]["lr"] == 0.5


def test_groups_keep_their_parameters_apart_when_there_are_two(accelerator: Accelerator) -> None:
    model = Tied()
    groups = [{"params": [model.embed.weight], "lr": 0.1}, {"params": list(model.norm.parameters()), "lr": 0.2}]
    state = gather_state(accelerator, model, torch.optim.SGD(groups), dtype=None)
    assert [(g["lr"], g["params"]) for g in state.param_groups] == [
        (0.1, ["embed.weight"]),
        (0.2, ["norm.weight", "norm.bias"]),
    ]


def test_learning_rate_is_a_number_when_the_optimizer_keeps_a_tensor(accelerator: Accelerator) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    assert gather_state(accelerator, model, optimizer, dtype=None).param_groups[0]["lr"] == 0.5


def test_moment_is_left_out_when_it_is_none(accelerator: Accelerator) -> None:
    model, optimizer = trained(accelerator, torch.optim.SGD, lr=0.1)
    assert gather_state(accelerator, model, optimizer, dtype=None).optimizer == {}
    model, optimizer = trained(accelerator, torch.optim.SGD, lr=0.1, momentum=0.9)
    state = gather_state(accelerator, model, optimizer, dtype=None)
    assert set(state.optimizer) == {f"momentum_buffer.{n}" for n in ("embed.weight", "norm.weight", "norm.bias")}


def test_error_is_told_when_the_optimizer_is_another_models(accelerator: Accelerator) -> None:
    stranger = torch.optim.SGD(nn.Linear(5, 2).parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match=r"group 0 with shape \(2, 5\) is not the model's"):
        gather_state(accelerator, Tied(), stranger, dtype=None)


def test_error_names_the_state_when_it_cannot_be_saved(accelerator: Accelerator) -> None:
    model, optimizer = trained(accelerator, Odd, lr=0.1)
    with pytest.raises(CheckpointError, match=r"Odd: cannot save its state 'history' of embed\.weight: a list"):
        gather_state(accelerator, model, optimizer, dtype=None)
