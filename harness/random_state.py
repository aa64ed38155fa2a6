"""The state of every random number generator of a rank, as JSON values (no pickle)."""

from __future__ import annotations

import base64
import random
from array import array
from typing import Any

import numpy as np
import torch


def take(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and, on CUDA, the device's generator, as they come.

    Effects: not collective; main thread; on CUDA it synchronises with the device; nothing on disk.
    """
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
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
        "python": [version, _encode(array("I", words).tobytes()), gauss],
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
    version, words, gauss = record["python"]
    random.setstate((version, tuple(array("I", _decode(words))), gauss))
    kind, keys, position, has_gauss, cached = record["numpy"]
    np.random.set_state((kind, np.frombuffer(_decode(keys), dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.frombuffer(bytearray(_decode(record["torch"])), dtype=torch.uint8))
    if device.type == "cuda" and "cuda" in record:
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(_decode(record["cuda"])), dtype=torch.uint8), device)


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _decode(text: str) -> bytes:
    return base64.b64decode(text)
