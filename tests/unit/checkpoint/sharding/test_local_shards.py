"""What cannot be saved rightly is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.parts import find_watched
from harness.checkpoint.state.trainer_state import Watched
from harness.errors import CheckpointError


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


class InAFormOfItsOwn(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight


class Metric(nn.Module):
    """Keeps tensors as attributes, and adds those that are persistent, as torchmetrics does."""

    def __init__(self, *, is_persistent: bool) -> None:
        super().__init__()
        self.total = torch.zeros(2)
        self.is_persistent = is_persistent

    def state_dict(self, *arguments: Any, prefix: str = "", **values: Any) -> Any:  # type: ignore[override]
        destination = super().state_dict(*arguments, prefix=prefix, **values)
        if self.is_persistent:
            destination[prefix + "total"] = self.total
        return destination


def hooked(*, adds: bool) -> nn.Module:
    module = nn.Linear(2, 2)

    def hook(module: nn.Module, state: Any, prefix: str, metadata: Any) -> None:
        if adds:
            state[prefix + "calls"] = 3

    module.register_state_dict_post_hook(hook)
    return module


def overridden(*, adds: bool) -> nn.Module:
    module = nn.Linear(2, 2)
    own = module.state_dict
    added = {"calls": 3} if adds else {}
    module.state_dict = lambda *arguments, **values: {**own(*arguments, **values), **added}  # type: ignore[method-assign, assignment]
    return module


class Renaming(nn.Linear):
    """The same tensors, under names of another version."""

    def state_dict(self, *arguments: Any, prefix: str = "", **values: Any) -> Any:  # type: ignore[override]
        return {f"{prefix}{name}_0": tensor for name, tensor in self.named_parameters()}


class OfTwoTensors(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WithExtraState(2, 2), r"0: WithExtraState keeps state .*\(get_extra_state\).*; make it a buffer"),
        (lambda: InAFormOfItsOwn(2, 2), r"0: InAFormOfItsOwn .*\(_save_to_state_dict\).*; make it a buffer"),
        (
            lambda: Metric(is_persistent=True),
            r"0: the state_dict\(\) of Metric has 0\.total, neither .*persistent\(False\)",
        ),
        (lambda: hooked(adds=True), r"0: the state_dict\(\) of Linear has 0\.calls, neither"),
        (lambda: overridden(adds=True), r"0: the state_dict\(\) of Linear has 0\.calls, neither"),
        (OfTwoTensors, "0.weight: is a TwoTensor, a tensor made of others, .*; convert it to a plain tensor"),
    ],
)
def test_error_names_the_module_when_it_has_extra_state(accelerator: Accelerator, make: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_watched(accelerator, Watched(nn.Sequential(make()), None, None), weights_only=True, dtype=None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Metric(is_persistent=False),
        lambda: Renaming(2, 2),
        lambda: hooked(adds=False),
        lambda: overridden(adds=False),
        lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ],
)
def test_module_is_accepted_when_its_state_dict_adds_nothing(accelerator: Accelerator, make: Any) -> None:
    model = nn.Sequential(make(), nn.Linear(2, 2))
    found = find_watched(accelerator, Watched(model, None, None), weights_only=True, dtype=None)
    assert {"1.weight", "1.bias"} <= {source.spec.name for source in found.tensors}


@pytest.mark.parametrize("state", [{True: torch.zeros(2)}, {"flags": {False: torch.zeros(2)}}])
def test_error_names_the_state_when_a_key_is_unsupported(accelerator: Accelerator, state: Any) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = state
    with pytest.raises(CheckpointError, match=r"SGD: cannot save its state '(True|flags)' of weight: .*True|False"):
        find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)


@pytest.mark.parametrize("name", ["weight", r"a tensor of shape \(3, 2\)"])
def test_error_names_the_tensor_when_it_is_in_no_group(accelerator: Accelerator, name: str) -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD([model.bias], lr=0.1)
    key = model.weight if name == "weight" else torch.zeros(3, 2)
    optimizer.state[key] = {}
    find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)
    optimizer.state[key]["average"] = torch.zeros(2)
    said = rf"SGD: has state \(average\) of {name}, which is in no parameter group"
    with pytest.raises(CheckpointError, match=said):
        find_watched(accelerator, Watched(model, optimizer, None), weights_only=False, dtype=None)
    find_watched(accelerator, Watched(model, optimizer, None), weights_only=True, dtype=None)


class Ahead(torch.optim.Optimizer):
    """Holds another optimizer, as Lookahead does."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__([nn.Parameter(torch.zeros(1))], {})


def test_users_own_optimizer_is_found_when_it_is_wrapped(accelerator: Accelerator) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert innermost(accelerator.prepare(optimizer)) is optimizer
    assert innermost(optimizer) is optimizer
    assert innermost(None) is None
    ahead = Ahead(optimizer)
    assert innermost(ahead) is ahead
    assert innermost(accelerator.prepare(ahead)) is ahead
