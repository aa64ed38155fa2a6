from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

from harness.checkpoint.names import named_state, unwrapped


class DistributedDataParallel(nn.Module):
    """As torch's own: known by its class's name, holds the model under `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DeepSpeedEngine(DistributedDataParallel):
    pass


class FSDPLinear(DistributedDataParallel):
    """As FSDP2 makes them: a subclass on the fly of the user's class."""


class Net(nn.Module):
    """Has a submodule of its own that is called `module`, and buffers of both kinds."""

    scale: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.module(x))) * self.scale
        return out


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.body = nn.Linear(3, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("a", torch.ones(2))
        self.register_buffer("b", self.a)


def names(model: nn.Module) -> set[str]:
    state = named_state(model)
    return {*state.parameters, *state.buffers, *state.aliases}


def test_names_and_order_are_those_of_state_dict_when_not_wrapped() -> None:
    model = Net()
    state = named_state(model)
    assert names(model) == set(model.state_dict())
    assert list(state.parameters) == [name for name, _ in model.named_parameters()]
    assert all(state.parameters[name] is parameter for name, parameter in model.named_parameters())


def test_own_submodule_keeps_its_name_when_called_module() -> None:
    assert {"module.weight", "module.bias"} <= set(named_state(Net()).parameters)


def test_buffer_is_left_out_when_not_persistent() -> None:
    state = named_state(Net())
    assert "cache" not in names(Net())
    assert set(state.buffers) == {"scale", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.parametrize(
    "wrap",
    [
        DistributedDataParallel,
        DeepSpeedEngine,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        checkpoint_wrapper,
        offload_wrapper,
        lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(DistributedDataParallel(checkpoint_wrapper(model)), backend="eager"),
    ],
)
def test_wrappers_are_taken_off_when_at_the_top(wrap: object) -> None:
    model = Net()
    expected = set(model.state_dict())
    wrapped = wrap(model)  # type: ignore[operator]
    assert names(wrapped) == expected
    assert unwrapped(wrapped) is model


def test_names_stay_the_same_when_a_compiled_model_has_run() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    compiled(torch.zeros(2, 2))
    assert set(named_state(compiled).parameters) == {name for name, _ in model.named_parameters()}


def test_wrappers_are_taken_off_when_inside() -> None:
    model = Net()
    expected = set(model.state_dict())
    model.head[0] = checkpoint_wrapper(model.head[0])
    model.module = torch.compile(model.module, backend="eager")
    assert "module._orig_mod.weight" in dict(model.named_parameters())
    assert names(model) == expected


def test_wrapper_is_known_when_its_class_is_a_subclass() -> None:
    inner = nn.Linear(1, 1)
    assert unwrapped(FSDPLinear(inner)) is inner
    assert unwrapped(inner) is inner


def test_tied_weight_stands_once_with_an_alias_when_shared() -> None:
    state = named_state(Tied())
    assert state.aliases == {"head.weight": "embed.weight", "b": "a"}
    assert set(state.parameters) == {"embed.weight", "body.weight", "body.bias"}
    assert set(state.buffers) == {"a"}


def test_whole_module_has_aliases_when_used_twice() -> None:
    shared = nn.Linear(2, 2)
    state = named_state(nn.Sequential(shared, nn.ReLU(), shared))
    assert set(state.parameters) == {"0.weight", "0.bias"}
    assert state.aliases == {"2.weight": "0.weight", "2.bias": "0.bias"}


def test_module_is_passed_over_when_it_is_none() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model.register_module("absent", None)
    assert names(model) == {"0.weight", "0.bias"}


def test_alias_is_found_when_the_tied_module_is_wrapped() -> None:
    model = Tied()
    model.head = checkpoint_wrapper(model.head)
    assert named_state(torch.compile(model, backend="eager")).aliases["head.weight"] == "embed.weight"
