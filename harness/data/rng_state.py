"""Capture and restore the random number generators of a rank, and encode their states as JSON values (no pickle)."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

# Python's and NumPy's default generators are Mersenne Twisters, with 624 words of 32 bits and a position.
_WORD = np.dtype("<u4")


def capture(device: torch.device) -> dict[str, Any]:
    """Copy the states of Python's, NumPy's, torch's and, on CUDA, the device's generator.

    Effects: not collective; main thread; takes about 55 us; on CUDA synchronises with the device; nothing on disk.
    """
    # A Mersenne Twister's tuple takes half as long as its dictionary; other kinds have only the dictionary.
    is_twister = isinstance(np.random.get_bit_generator(), np.random.MT19937)  # type: ignore[attr-defined]
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state() if is_twister else np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore(states: dict[str, Any], device: torch.device) -> None:
    """Set the generators to captured states.

    The device's generator is set only if `device` and `states` both have one, and NumPy's only if its kind is the
    captured one.

    Effects: not collective; main thread; nothing on disk.
    """
    random.setstate(states["python"])
    numpy_state = states["numpy"]
    kind = numpy_state["bit_generator"] if isinstance(numpy_state, dict) else numpy_state[0]
    if type(np.random.get_bit_generator()).__name__ == kind:  # type: ignore[attr-defined]
        np.random.set_state(numpy_state)
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def encode(states: dict[str, Any]) -> dict[str, Any]:
    """Convert captured states to JSON values; from any thread. An empty mapping stays empty."""
    if not states:
        return {}
    version, words, gauss = states["python"]
    record: dict[str, Any] = {
        "python": [version, _to_text(np.array(words, dtype=_WORD).tobytes()), gauss],
        "numpy": _encode_numpy(states["numpy"]),
    }
    for name in ("torch", "cuda"):
        if name in states:
            record[name] = _to_text(states[name].numpy().tobytes())
    return record


def decode(record: dict[str, Any]) -> dict[str, Any]:
    """Convert the result of `encode` back to states for `restore`."""
    if not record:
        return {}
    version, words, gauss = record["python"]
    states: dict[str, Any] = {
        "python": (version, tuple(np.frombuffer(_to_bytes(words), dtype=_WORD).tolist()), gauss),
        "numpy": _decode_numpy(record["numpy"]),
    }
    for name in ("torch", "cuda"):
        if name in record:
            states[name] = torch.frombuffer(bytearray(_to_bytes(record[name])), dtype=torch.uint8)
    return states


def _encode_numpy(state: Any) -> Any:
    """Encode the state of a Mersenne Twister as a list, and that of another kind as nested mappings."""
    if isinstance(state, tuple):
        kind, keys, *others = state
        return [kind, _to_text(np.asarray(keys, dtype=_WORD).tobytes()), *others]
    if isinstance(state, dict):
        return {name: _encode_numpy(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": str(state.dtype), "bytes": _to_text(state.tobytes())}
    return state.item() if isinstance(state, np.generic) else state


def _decode_numpy(record: Any) -> Any:
    if isinstance(record, list):
        kind, keys, *others = record
        return (kind, np.frombuffer(_to_bytes(keys), dtype=_WORD), *others)
    if isinstance(record, dict):
        if record.keys() == {"dtype", "bytes"}:
            return np.frombuffer(_to_bytes(record["bytes"]), dtype=record["dtype"])
        return {name: _decode_numpy(value) for name, value in record.items()}
    return record


def _to_text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _to_bytes(text: str) -> bytes:
    return base64.b64decode(text)
