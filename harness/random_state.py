"""The state of every random number generator of a rank, as JSON values (no pickle)."""

from __future__ import annotations

import base64
import ctypes
import random
from array import array
from typing import Any

import numpy as np
import torch

# A Mersenne Twister, Python's as numpy's: 624 words and a position.
_MT19937_BYTES = 2500


class _NumpyState:
    """The state of numpy's own generator, asked for again only where its memory has changed.

    To ask takes 60 us and this 1 us: it is asked for before each batch that this process loads.
    """

    def __init__(self) -> None:
        self._memory = b""
        self._state: Any = None

    def take(self) -> Any:
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        memory = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
        # A normal number that is kept for later is not in that memory.
        if self._state is None or memory != self._memory or self._state[3]:
            self._memory, self._state = memory, np.random.get_state()
        return self._state


_numpy_state = _NumpyState()


# The generator behind the functions of `random`.
_python: Any = random.random.__self__  # type: ignore[attr-defined]


def _words_asked_for() -> bytes:
    """The words of `random.getstate`, and the position behind them."""
    return array("I", random.getstate()[1]).tobytes()


def _words_in_memory() -> bytes:
    """The same in 0.5 us, where to ask takes 15, for a tuple of 625 numbers: there the position comes first."""
    memory = ctypes.string_at(id(_python) + object.__basicsize__, _MT19937_BYTES)
    return memory[4:] + memory[:4]


def _lie_as_known() -> bool:
    """Whether this interpreter has them where CPython has always had them, which nobody promises."""
    is_large_enough = type(_python).__basicsize__ >= object.__basicsize__ + _MT19937_BYTES
    return is_large_enough and _words_in_memory() == _words_asked_for()


_python_words = _words_in_memory if _lie_as_known() else _words_asked_for


def take(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and, on CUDA, the device's generator, as they come.

    Effects: not collective; main thread, 4 us; on CUDA it synchronises with the device; nothing on disk.
    """
    states = {
        "python": (_python.VERSION, _python_words(), _python.gauss_next),
        "numpy": _numpy_state.take(),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def encoded(states: dict[str, Any]) -> dict[str, Any]:
    """What `take` gave, as JSON values; from any thread. Of nothing, nothing."""
    if not states:
        return {}
    version, words, gauss = states["python"]
    kind, keys, position, has_gauss, cached = states["numpy"]
    record: dict[str, Any] = {
        "python": [version, _encode(words), gauss],
        "numpy": [kind, _encode(np.asarray(keys, dtype=np.uint32).tobytes()), position, has_gauss, cached],
    }
    for name in ("torch", "cuda"):
        if name in states:
            record[name] = _encode(states[name].numpy().tobytes())
    return record


def capture(device: torch.device) -> dict[str, Any]:
    """What `take` takes, encoded at once."""
    return encoded(take(device))


def restore(record: dict[str, Any], device: torch.device) -> None:
    """Put back what `capture` took; the device's generator only where both have one."""
    put_back(decoded(record), device)


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text)


def put_back(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `take` took."""
    version, words, gauss = states["python"]
    random.setstate((version, tuple(array("I", words)), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def decoded(record: dict[str, Any]) -> dict[str, Any]:
    """What `take` took, of what `encoded` made of it."""
    if not record:
        return {}
    version, words, gauss = record["python"]
    kind, keys, position, has_gauss, cached = record["numpy"]
    states: dict[str, Any] = {
        "python": (version, _decode(words), gauss),
        "numpy": (kind, np.frombuffer(_decode(keys), dtype=np.uint32), position, has_gauss, cached),
    }
    for name in ("torch", "cuda"):
        if name in record:
            states[name] = torch.frombuffer(bytearray(_decode(record[name])), dtype=torch.uint8)
    return states
