"""What cannot be saved rightly is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from harness.checkpoint.shards.held import find_held, innermost
from harness.errors import CheckpointError


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


class InAFormOfItsOwn(nn.Linear):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "packed"] = self.weight


class OfTwoTensors(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WithExtraState(2, 2), r"0: WithExtraState keeps state .*\(get_extra_state\).*; make it a buffer"),
        (lambda: InAFormOfItsOwn(2, 2), r"0: InAFormOfItsOwn .*\(_save_to_state_dict\).*; make it a buffer"),
        (OfTwoTensors, "0.weight: is a TwoTensor, a tensor made of others, .*; convert it to a plain tensor"),
    ],
)
def test_error_names_the_module_when_its_state_is_not_its_tensors(
    accelerator: Accelerator, make: Any, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        find_held(accelerator, nn.Sequential(make()), None, weights_only=True, dtype=None)


def test_users_own_optimizer_is_found_when_it_is_wrapped(accelerator: Accelerator) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    assert innermost(accelerator.prepare(optimizer)) is optimizer
    assert innermost(optimizer) is optimizer
    assert innermost(None) is None
