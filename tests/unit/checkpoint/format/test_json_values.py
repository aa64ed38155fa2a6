from __future__ import annotations

import json
import math
from collections import Counter, deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from harness.checkpoint.format.json_values import UnsavableTensor, decode, encode
from harness.checkpoint.state.kept_tensors import KeptTensors, tensor_getter

KEYS = st.one_of(st.text(max_size=5), st.integers(), st.tuples(st.integers(), st.text(max_size=2)))
NUMBERS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
        st.frozensets(NUMBERS, max_size=3).map(set),
    ),
    max_leaves=12,
)


def same(first: Any, second: Any) -> bool:
    if type(first) is not type(second):
        return False
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    return bool(first == second)


@given(VALUES)
def test_value_is_the_same_when_it_was_strict_json_between(value: Any) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


def test_tensors_are_found_when_they_are_stored_elsewhere() -> None:
    kept = KeptTensors()
    value = {"a": [torch.arange(3), torch.tensor(2.0)], "b": deque([torch.zeros(0)], maxlen=3), "c": torch.bfloat16}
    text = json.dumps(encode(value, kept.put), allow_nan=False)
    value["a"][0].zero_()  # type: ignore[index]
    assert [tensor.tolist() for tensor in kept.tensors.values()] == [[0, 1, 2], []]
    found = decode(json.loads(text), tensor_getter(kept.tensors, torch.device("cpu")))
    assert repr(found) == repr({**value, "a": [torch.arange(3), torch.tensor(2.0)]})
    with pytest.raises(ValueError, match="stored"):
        decode(json.loads(text))


@pytest.mark.parametrize("content", [None, 1, ["0"], ["x", True], ["0", 1], [[], True]])
def test_reference_is_refused_when_it_is_damaged(content: Any) -> None:
    with pytest.raises(ValueError):
        decode({"$stored": content}, tensor_getter({"0": torch.zeros(2)}, torch.device("cpu")))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.eye(2).to_sparse(), "a sparse tensor"),
        (TwoTensor(torch.zeros(2), torch.zeros(2)), "TwoTensor"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_tensor_is_refused_when_it_cannot_be_kept(value: Tensor, said: str) -> None:
    with pytest.raises(UnsavableTensor, match=said):
        encode([value], KeptTensors().put)


def test_number_is_none_when_it_was_none() -> None:
    assert math.isnan(decode(json.loads(json.dumps(encode(math.nan), allow_nan=False))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_is_the_same_when_it_has_one_element(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.tensor(0.1).to(dtype).reshape(shape)
    found = decode(json.loads(json.dumps(encode(value))))
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert torch.equal(found, value)


def test_numbers_of_numpy_are_pythons_when_encoded() -> None:
    assert encode([np.float64(0.1), np.int32(3), np.float32(0.5), np.bool_(True)]) == [0.1, 3, 0.5, True]


@pytest.mark.parametrize("value", [object(), torch.zeros(2), print, [{"a": object()}], b"bytes"])
def test_error_has_the_type_when_a_value_is_unsupported(value: object) -> None:
    with pytest.raises(TypeError, match="is not a number, a text or a list of these"):
        encode(value)


def test_error_has_the_size_when_a_number_is_too_long() -> None:
    longest = 10**4000
    assert decode(json.loads(json.dumps(encode(longest)))) == longest
    with pytest.raises(TypeError, match="an int of 16610 bits is too long to be written as text"):
        encode(10**5000)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"$tuple": [value]}
    return value


@pytest.mark.parametrize(
    "value",
    [
        {"$float": "x"},
        {"$unknown": 1},
        {"$tuple": 3, "other": 4},
        {"$dict": [1]},
        {"$tensor": [1, "nn", []]},
        {"$tensor": [1, "float32", [2]]},
        {"$counter": None},
        {"$float": 3.0},
        {"$float": "1.5"},
        {"$tuple": "ab"},
        {"$tuple": {"a": 1}},
        {"$set": [[]]},
        {"$set": "ab"},
        {"$dict": {"ab": 1}},
        {"$dict": [[[], 1]]},
        {"$tensor": [10**400, "int64", []]},
        {"$tensor": [1, "float32", [-1]]},
        {"$tensor": [[1], "float32", [1]]},
        {"$tensor": ["a", "float32", []]},
        {"$tensor": [1, 3, []]},
        nested(5000),
    ],
)
def test_error_is_a_value_error_when_it_is_damaged(value: Any) -> None:
    with pytest.raises(ValueError):
        decode([value])


@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5, 5]),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3),
        lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
            ],
            [2],
        ),
    ],
)
def test_schedulers_continue_identically_when_restored(make: Any) -> None:
    def made() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        return optimizer, make(optimizer)

    def stepped(optimizer: torch.optim.Optimizer, scheduler: Any) -> float:
        optimizer.step()
        takes_metric = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0) if takes_metric else scheduler.step()
        return float(optimizer.param_groups[0]["lr"])

    first, first_scheduler = made()
    for _ in range(2):
        stepped(first, first_scheduler)
    state = json.loads(json.dumps(encode(first_scheduler.state_dict()), allow_nan=False))
    second, second_scheduler = made()
    second.param_groups[0]["lr"] = first.param_groups[0]["lr"]
    second_scheduler.load_state_dict(decode(state))
    for _ in range(6):
        assert stepped(second, second_scheduler) == stepped(first, first_scheduler)
