from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from harness.data import rng_state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    states = rng_state.capture(CPU)
    yield
    rng_state.restore(states, CPU)


def record() -> Any:
    """The current states, through JSON text."""
    return json.loads(json.dumps(rng_state.encode(rng_state.capture(CPU))))


def restore(record: Any) -> None:
    rng_state.restore(rng_state.decode(record), CPU)


def draw() -> tuple[object, ...]:
    return (
        [random.random() for _ in range(5)],
        random.gauss(0, 1),
        np.random.standard_normal(5).tolist(),
        torch.rand(5).tolist(),
        torch.randperm(7).tolist(),
    )


def test_draws_repeat_when_states_were_stored_as_json() -> None:
    # An odd number of normal draws: Python's and NumPy's generators each keep a second value for the next call.
    random.gauss(0, 1), np.random.standard_normal(3), torch.randn(3)
    saved = record()
    expected = draw()
    assert draw() != expected
    restore(saved)
    assert draw() == expected


def test_encoding_is_that_of_existing_checkpoints() -> None:
    # Words and position as 32-bit integers in base64; one normal value is kept for the next call.
    random.seed(7), np.random.seed(7)
    random.gauss(0, 1), np.random.standard_normal()
    saved = record()
    version, words, gauss = saved["python"]
    expected = np.array(random.getstate()[1], dtype=np.uint32)
    assert (version, gauss) == (3, random.getstate()[2])
    assert rng_state._to_bytes(words) == expected.tobytes()
    kind, keys, position, has_gauss, _ = saved["numpy"]
    assert (kind, position, has_gauss) == ("MT19937", np.random.get_state()[2], 1)
    assert rng_state._to_bytes(keys) == np.random.get_state()[1].tobytes()


@pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_draws_repeat_when_numpy_has_another_generator(kind: Any) -> None:
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(kind(1))
    try:
        np.random.standard_normal(3)
        for _ in range(2):
            saved = record()
            expected = draw()
            restore(saved)
            assert draw() == expected
        twister = np.random.RandomState(0).get_state()
        state = np.random.get_state(legacy=False)
        restore({**saved, "numpy": rng_state._encode_numpy(twister)})
        assert str(np.random.get_state(legacy=False)) == str(state)  # another kind's state cannot be restored
    finally:
        np.random.set_bit_generator(before)


def test_capture_draws_nothing() -> None:
    assert record() == record()


def test_device_state_is_ignored_when_the_device_is_a_cpu() -> None:
    saved = record()
    assert "cuda" not in saved
    restore({**saved, "cuda": "AAAA"})  # captured on a GPU
    assert record() == saved


def draw_none() -> None:
    pass


def draw_as_many_as_the_state_has_words() -> None:
    [random.getrandbits(32) for _ in range(624)]
    np.random.randint(0, 2**32, 624, dtype=np.uint32)


def draw_normal_values() -> None:
    random.gauss(0, 1), np.random.standard_normal()


def seed() -> None:
    random.seed(3), np.random.seed(3)


@pytest.mark.parametrize("change", [draw_none, draw_as_many_as_the_state_has_words, draw_normal_values, seed])
def test_states_are_current_when_captured_again(change: Callable[[], None]) -> None:
    for _ in range(3):
        rng_state.capture(CPU)
        change()
        states = rng_state.capture(CPU)
        kind, words, *rest = np.random.get_state()
        assert (states["numpy"][0], states["numpy"][1].tolist(), *states["numpy"][2:]) == (kind, words.tolist(), *rest)
        assert states["python"] == random.getstate()
        assert torch.equal(states["torch"], torch.get_rng_state())
