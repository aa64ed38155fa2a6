from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from harness.metrics.reducer import Reducer, WeightedSums
from harness.metrics.values import LoggedValues

NUMBERS = {
    "int": (3, 3.0),
    "int beyond 64 bits": (2**63 + 1, float(2**63)),
    "bool": (True, 1.0),
    "decimal": (Decimal("0.25"), 0.25),
    "fraction": (Fraction(1, 4), 0.25),
    "text": ("0.25", 0.25),
    "np.float32": (np.float32(0.25), 0.25),
    "np.int64": (np.int64(7), 7.0),
    "array": (np.array([0.25]), 0.25),
    "tensor": (torch.tensor([[0.25]]), 0.25),
    "tensor with a graph": (torch.tensor(0.25, requires_grad=True), 0.25),
    "bool tensor": (torch.tensor(True), 1.0),
    "infinite": (math.inf, math.inf),
}
OTHERS = {
    "None": (None, "a NoneType is no number"),
    "text": ("good", "a str is no number"),
    "complex": (1 + 2j, "a complex is no number"),
    "np.complex64": (np.complex64(1j), "a complex64 of shape () is no number"),
    "complex tensor": (torch.tensor(1j), "a Tensor of shape () is no number"),
    "array": (np.ones(2), "a ndarray of shape (2,) is no number"),
    "dict": ({"f1": 0.5}, "a dict is no number"),
    "meta tensor": (torch.ones((), device="meta"), "a Tensor of shape () is no number"),
    "int beyond what Python writes": (10**5000, "an int of 16610 bits is more than a float holds"),
    "huge int": (10**400, "an int of 1329 bits is more than a float holds"),
}


@pytest.mark.parametrize(("value", "number"), NUMBERS.values(), ids=NUMBERS)
def test_value_is_a_float_when_it_is_a_number_of_any_kind(value: Any, number: float) -> None:
    said: list[str] = []
    found = LoggedValues(said.append).numbers({"x": value})
    assert found == {"x": number} and type(found["x"]) is float
    assert said == []


@pytest.mark.parametrize(("value", "why"), OTHERS.values(), ids=OTHERS)
def test_line_is_said_once_when_a_value_is_no_number(value: Any, why: str) -> None:
    said: list[str] = []
    values = LoggedValues(said.append)
    for _ in range(3):
        assert values.numbers({"x": value, "y": 1.0}) == {"y": 1.0}
    assert said == [f"x is left out: {why}"]


STEPS = {
    "int": (3, 3, ""),
    "negative": (-1, -1, ""),
    "np.int64": (np.int64(3), 3, ""),
    "whole float": (3.0, 3, ""),
    "tensor": (torch.tensor(3), 3, ""),
    "bool": (True, 1, ""),
    "text": ("3", 3, ""),
    "fraction": (3.5, 3, "a step is 3.5; fractions of steps are cut off, as in 3"),
    "np.float32": (np.float32(3.5), 3, "fractions of steps are cut off, as in 3"),
    "beyond 64 bits": (2**63, None, "a step is 9223372036854775808, no integer of 64 bits"),
    "infinite": (math.inf, None, "a step is inf, no integer of 64 bits"),
    "beyond what Python writes": (10**5000, None, "a step is (int of 16610 bits), no integer of 64 bits"),
    "words": ("last", None, "a step is 'last', no integer of 64 bits"),
    "None": (None, None, ""),
}


@pytest.mark.parametrize(("value", "step", "why"), STEPS.values(), ids=STEPS)
def test_step_is_an_integer_of_64_bits_when_it_is_of_any_kind(value: Any, step: int | None, why: str) -> None:
    said: list[str] = []
    values = LoggedValues(said.append)
    for _ in range(2):
        found = values.step(value)
        assert found == step and type(found) in (int, type(None))
    assert len(said) == bool(why) and all(why in line for line in said)


@pytest.mark.parametrize("holds_all", [False, True], ids=["at once", "held"])
def test_window_has_the_numbers_when_others_are_logged_beside_them(holds_all: bool) -> None:
    said: list[str] = []
    reducer, sums = Reducer(None, ()), WeightedSums(LoggedValues(said.append), holds_all=holds_all)
    for _ in range(2):
        sums.add({f"bad/{name}": value for name, (value, _) in OTHERS.items() if name not in ("array", "meta tensor")})
        sums.add({name: value for name, (value, _) in NUMBERS.items()}, 2)
        sums.add({1: 0.5, "1": 0.25, "\ud800": 1.0})  # type: ignore[dict-item]
    reducer.start(sums, 1, {})
    reduced = reducer.finish()
    assert reduced is not None
    assert reduced.values == {**{name: number for name, (_, number) in NUMBERS.items()}, "1": 0.375, "?": 1.0}
    assert len(said) == len(OTHERS) - 2
