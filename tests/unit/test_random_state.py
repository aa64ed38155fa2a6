from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import rng_state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _generators_as_they_were() -> Iterator[None]:
    record = rng_state.capture(CPU)
    yield
    rng_state.restore(record, CPU)


def draw() -> tuple[object, ...]:
    return (
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.standard_normal(5).tolist(),
        torch.rand(5).tolist(),
        torch.randperm(7).tolist(),
    )


def test_same_numbers_follow_when_the_state_went_through_json() -> None:
    # An odd number of normal draws, so that each generator holds one back.
    random.gauss(0, 1), np.random.standard_normal(3), torch.randn(3)
    text = json.dumps(rng_state.capture(CPU))
    expected = draw()
    assert draw() != expected
    rng_state.restore(json.loads(text), CPU)
    assert draw() == expected


def test_numbers_are_those_that_python_gives_when_they_are_read_in_memory() -> None:
    state = rng_state._PythonState()
    # Wherever the suite runs: or each batch costs what asking does.
    assert state.is_in_memory
    for num_drawn in (0, 1, 623, 7):
        for _ in range(num_drawn):
            random.random()
        version, (*words, position), held_back = random.getstate()
        assert state.take() == (version, array("I", [position, *words]).tobytes(), held_back)


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_same_numbers_follow_when_numpys_generator_is_of_another_kind(kind: Any) -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(1))
    try:
        np.random.standard_normal(3)
        for _ in range(2):
            text = json.dumps(rng_state.capture(CPU))
            expected = draw()
            rng_state.restore(json.loads(text), CPU)
            assert draw() == expected
        twister = np.random.RandomState(0).get_state()
        state = np.random.get_state(legacy=False)
        rng_state.restore({**json.loads(text), "numpy": rng_state._encode_numpy(twister)}, CPU)
        assert str(np.random.get_state(legacy=False)) == str(state)  # one of another kind cannot be put back
    finally:
        np.random.set_bit_generator(before)


def test_nothing_is_drawn_when_captured() -> None:
    assert rng_state.capture(CPU) == rng_state.capture(CPU)


def test_device_state_is_left_alone_when_the_device_is_a_cpu() -> None:
    record = rng_state.capture(CPU)
    assert "cuda" not in record
    rng_state.restore({**record, "cuda": "AAAA"}, CPU)  # from a GPU; must not be looked at here
    assert rng_state.capture(CPU) == record


def draw_none() -> None:
    pass


def draw_as_many_as_there_are_words() -> None:
    [random.getrandbits(32) for _ in range(624)]
    np.random.randint(0, 2**32, 624, dtype=np.uint32)


def hold_one_back() -> None:
    random.gauss(0, 1), np.random.standard_normal()


def seed() -> None:
    random.seed(3), np.random.seed(3)


@pytest.mark.parametrize("change", [draw_none, draw_as_many_as_there_are_words, hold_one_back, seed])
def test_state_is_the_one_of_now_when_it_was_taken_before(change: Callable[[], None]) -> None:
    for _ in range(3):
        rng_state.take(CPU)
        change()
        taken = rng_state.take(CPU)
        kind, words, *rest = np.random.get_state()
        assert (taken["numpy"][0], taken["numpy"][1].tolist(), *taken["numpy"][2:]) == (kind, words.tolist(), *rest)
        version, (*words, position), held_back = random.getstate()
        assert taken["python"] == (version, array("I", [position, *words]).tobytes(), held_back)
