from __future__ import annotations

import json
import random
from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.checkpoint.sharding.state_form import Branch, build, checked, form_of, leaves_of, needed_form
from tests.unit.checkpoint.optimizers import Projector

LIKE = torch.zeros(2)
TREE: dict[Any, Any] = {
    "step": 3,
    "matrices": [torch.ones(2), None, [torch.zeros(()), 0.5]],
    "queue": deque([torch.ones(1), True], maxlen=4),
    "pair": (torch.ones(3), "text"),
    "shape": torch.Size([2, 3]),
    "nested": OrderedDict(a={"b": [1]}),
    "empty": [],
    "by_rate": {0.9: torch.ones(1), 0: 1},
}


def test_value_is_the_same_when_built_from_its_form_and_leaves() -> None:
    form = checked(json.loads(json.dumps(form_of(TREE, LIKE))))
    values = {leaf.name: leaf.value for leaf in leaves_of(TREE)}
    built = build(form, lambda path, kind: values[".".join(map(str, path))])
    assert repr(built) == repr(TREE)
    assert list(built) == list(TREE) and built["queue"].maxlen == 4


def test_leaves_are_current_when_containers_are_replaced() -> None:
    state = {"pair": ([torch.zeros(1)], 1), "queue": deque([1.0, 2.0])}
    leaves = {leaf.name: leaf for leaf in leaves_of(state)}
    assert list(leaves) == ["pair.0.0", "pair.1", "queue.0", "queue.1"]
    state["pair"] = ([torch.ones(1)], 2)
    state["queue"] = deque([3.0, 4.0])
    assert [leaf.holder[leaf.key] for leaf in leaves.values()] == [torch.ones(1), 2, 3.0, 4.0]
    Branch(state)["pair", 1] = 5
    assert state["pair"] == ([torch.ones(1)], 5)


@pytest.mark.parametrize(
    ("state", "is_needed"),
    [
        ({"step": torch.zeros(()), "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)}, False),
        ({"momentum_buffer": torch.zeros(2)}, False),
        ({"exp_avg": torch.zeros(2), "step": torch.zeros(())}, True),
        ({"step": 1}, True),
        ({"step": torch.zeros((), dtype=torch.int64)}, True),
        ({"prev": None}, True),
        ({"prev": [torch.zeros(2)]}, True),
        ({0: torch.zeros(2)}, True),
    ],
)
def test_form_is_needed_when_the_names_do_not_tell_the_state(state: dict[str, Any], is_needed: bool) -> None:
    assert (needed_form(state, LIKE) is not None) == is_needed


def test_form_is_that_of_the_state_dict_when_it_is_an_object() -> None:
    projector = Projector()
    projector(torch.ones(2))
    state = {"projectors": [projector]}
    assert [leaf.name for leaf in leaves_of(state)] == [
        "projectors.0.factors.0",
        "projectors.0.factors.1",
        "projectors.0.num_calls",
    ]
    assert all(leaf.is_made for leaf in leaves_of(state))
    built = build(checked(form_of(state, LIKE)), lambda path, kind: kind)
    assert built == {"projectors": [{"factors": ["tensor", "tensor"], "num_calls": "int"}]}


@pytest.mark.parametrize("value", [{1}, {"a": 1j}, slice(1), {(1,): 2}, {True: 2}, torch.float32, [object]])
def test_form_is_refused_when_a_value_is_unsupported(value: Any) -> None:
    with pytest.raises(TypeError):
        form_of(value, LIKE)


def test_only_value_errors_are_raised_when_a_form_is_damaged() -> None:
    numbers = random.Random(0)
    whole = form_of(TREE, LIKE)
    refused = 0
    for _ in range(400):
        form = json.loads(json.dumps(whole))
        _damage(form, numbers)
        try:
            build(checked(form), lambda path, kind: 0)
        except ValueError:
            refused += 1
    assert refused > 100


def _damage(form: Any, numbers: random.Random) -> None:
    """Replace one value somewhere in it."""
    while True:
        key = numbers.choice(list(form) if isinstance(form, dict) else range(len(form)))
        if isinstance(form[key], (dict, list)) and form[key] and numbers.random() < 0.8:
            form = form[key]
            continue
        form[key] = numbers.choice(
            [None, 1, -1, "x", "tensor", {}, [], {"tuple": 3}, {"deque": [[1], 0]}, {"dict": [[]]}]
        )
        return


def test_form_has_the_device_when_a_tensor_has_one_element() -> None:
    value: Tensor = torch.zeros((), device="meta")
    assert form_of(value, LIKE) == "device_tensor"
    assert form_of(torch.zeros(2, device="meta"), LIKE) == "tensor"


@pytest.mark.parametrize(
    ("value", "like", "form"),
    [
        (torch.zeros(3, 2).t(), torch.zeros(4), {"order": [1, 0]}),
        (torch.zeros(3, 2).t(), torch.zeros(2, 3), {"order": [1, 0]}),
        (torch.zeros(3, 2).t(), torch.zeros(3, 2).t(), "tensor"),
        (torch.zeros(2, 3), torch.zeros(3, 2).t(), {"order": [0, 1]}),
        (torch.zeros(4, 6)[:, ::2], torch.zeros(4), "tensor"),
        (torch.zeros(1).expand(4), torch.zeros(4), "tensor"),
    ],
)
def test_order_is_in_the_form_when_it_is_not_the_expected_one(value: Tensor, like: Tensor, form: Any) -> None:
    assert checked(form_of(value, like)) == form
