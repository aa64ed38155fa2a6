"""Learning rates as metrics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from harness.metrics.learning_rates import LearningRates


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.1], {"train/lr": 0.1}),
        ([torch.tensor(0.5), np.float32(0.5)], {"train/lr": 0.5}),
        ([0.1, 0.2], {"train/lr/group0": 0.1, "train/lr/group1": 0.2}),
        # As transformers' Adafactor has it with relative steps.
        ([None], {}),
        ([None, 0.1, None, 0.2], {"train/lr/group1": 0.1, "train/lr/group3": 0.2}),
        (["auto", torch.ones(2), 1], {"train/lr": 1.0}),
    ],
)
def test_rates_are_those_of_groups_that_have_a_number(rates: list[Any], expected: dict[str, float]) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in rates], lr=0.1)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    learning_rates = LearningRates()
    learning_rates.optimizers = {"": optimizer}
    assert learning_rates.now() == expected


def test_group_without_a_rate_has_none() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    learning_rates = LearningRates()
    learning_rates.optimizers = {"": optimizer}
    assert learning_rates.now() == {}
