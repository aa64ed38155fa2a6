"""The state of every random number generator of a rank, as JSON values (no pickle)."""

from __future__ import annotations

import base64
import random
from array import array
from typing import Any

import numpy as np
import torch


def capture(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and, on CUDA, the device's generator.

    Effects: not collective; main thread; on CUDA it synchronises with the device; nothing on disk.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    record: dict[str, Any] = {
        "python": [version, _encode(array("I", words).tobytes()), gauss],
        "numpy": [kind, _encode(np.asarray(keys, dtype=np.uint32).tobytes()), position, has_gauss, cached],
        "torch": _encode(torch.get_rng_state().numpy().tobytes()),
    }
    if device.type == "cuda":
        record["cuda"] = _encode(torch.cuda.get_rng_state(device).numpy().tobytes())
    return record


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
