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


def _memory_at(address: int) -> Any:
    return (ctypes.c_char * _MT19937_BYTES).from_address(address)


class _NumpyState:
    """The state of numpy's own generator, asked for again only where it has changed.

    To ask takes 60 us; this less than 1, in two lines of the cache: it is asked for before each batch that this process
    loads. Each draw moves the position, which is at the end of that memory, and makes all words new before it comes
    round; another seed has other words. (Who takes a normal number that was kept, has this asked, and then sets the
    state from before, is given the number's absence: it is not in that memory.)
    """

    def __init__(self) -> None:
        self._generator: Any = None
        self._memory: Any = None
        self._end = b""
        self._state: Any = None

    def take(self) -> Any:
        generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if generator is not self._generator:
            self._generator = generator
            self.forget()
            # numpy's own is a Mersenne Twister; a script may have put another kind in its place.
            is_known = type(generator) is np.random.MT19937
            self._memory = _memory_at(generator.ctypes.state_address) if is_known else None
        if self._memory is None:
            return np.random.get_state(legacy=False)
        end = self._memory[-32:]
        # A normal number that is kept for later is not in that memory.
        if self._state is None or end != self._end or self._state[3]:
            self._end, self._state = end, np.random.get_state()
        return self._state

    def forget(self) -> None:
        """Ask the next time."""
        self._state = None

    def put_back(self, state: Any) -> None:
        """Have the generator stand where it stood; one of another kind than it was is left alone."""
        kind = state["bit_generator"] if isinstance(state, dict) else state[0]
        if type(np.random.get_bit_generator()).__name__ == kind:  # type: ignore[attr-defined]
            np.random.set_state(state)
        self.forget()


class _PythonState:
    """The state of the generator behind the functions of `random`, copied only where it has changed.

    To ask takes 15 us, for a tuple of 625 numbers; the memory that they are in begins with the position.
    """

    def __init__(self) -> None:
        self._generator: Any = random.random.__self__  # type: ignore[attr-defined]
        self._begin = self._numbers = b""
        size_bytes = object.__basicsize__ + _MT19937_BYTES
        # Where CPython has always had them, which nobody promises.
        if type(self._generator).__basicsize__ >= size_bytes:
            self._memory = _memory_at(id(self._generator) + object.__basicsize__)
        self.is_in_memory = hasattr(self, "_memory") and self._memory.raw == self._asked_for()

    def take(self) -> tuple[int, bytes, float | None]:
        """As `random.getstate` gives it, but the numbers as they are in memory: the position, and then the words."""
        if not self.is_in_memory:
            self._numbers = self._asked_for()
        elif (begin := self._memory[:32]) != self._begin:
            self._begin, self._numbers = begin, self._memory.raw
        return self._generator.VERSION, self._numbers, self._generator.gauss_next

    def _asked_for(self) -> bytes:
        *words, position = random.getstate()[1]
        return array("I", [position, *words]).tobytes()


_numpy_state, _python_state = _NumpyState(), _PythonState()


def take(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and, on CUDA, the device's generator, as they come.

    Effects: not collective; main thread, 3 us; on CUDA it synchronises with the device; nothing on disk.
    """
    states = {"python": _python_state.take(), "numpy": _numpy_state.take(), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def encoded(states: dict[str, Any]) -> dict[str, Any]:
    """What `take` gave, as JSON values; from any thread. Of nothing, nothing."""
    if not states:
        return {}
    version, numbers, gauss = states["python"]
    record: dict[str, Any] = {
        "python": [version, _encode(numbers[4:] + numbers[:4]), gauss],
        "numpy": _encode_numpy(states["numpy"]),
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


def _encode_numpy(state: Any) -> Any:
    """Of a Mersenne Twister a list; of another kind nested fields, as its `state` has them."""
    if isinstance(state, tuple):
        kind, keys, *others = state
        return [kind, _encode(np.asarray(keys, dtype=np.uint32).tobytes()), *others]
    if isinstance(state, dict):
        return {name: _encode_numpy(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "bytes": _encode(state.tobytes())}
    return state.item() if isinstance(state, np.generic) else state


def _decode_numpy(record: Any) -> Any:
    if isinstance(record, list):
        kind, keys, *others = record
        return (kind, np.frombuffer(_decode(keys), dtype=np.uint32), *others)
    if isinstance(record, dict):
        if record.keys() == {"dtype", "bytes"}:
            return np.frombuffer(_decode(record["bytes"]), dtype=record["dtype"])
        return {name: _decode_numpy(value) for name, value in record.items()}
    return record


def put_back(states: dict[str, Any], device: torch.device) -> None:
    """Put back what `take` took."""
    version, numbers, gauss = states["python"]
    position, *words = array("I", numbers)
    random.setstate((version, (*words, position), gauss))
    _numpy_state.put_back(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def decoded(record: dict[str, Any]) -> dict[str, Any]:
    """What `take` took, of what `encoded` made of it."""
    if not record:
        return {}
    version, words, gauss = record["python"]
    numbers = _decode(words)
    states: dict[str, Any] = {
        "python": (version, numbers[-4:] + numbers[:-4], gauss),
        "numpy": _decode_numpy(record["numpy"]),
    }
    for name in ("torch", "cuda"):
        if name in record:
            states[name] = torch.frombuffer(bytearray(_decode(record[name])), dtype=torch.uint8)
    return states
