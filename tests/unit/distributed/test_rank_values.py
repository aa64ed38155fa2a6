"""What one rank sends another arrives as it was, and can run nothing."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from harness.checkpoint.format.commit import FileRecord
from harness.checkpoint.format.layout import TensorSpec
from harness.checkpoint.format.ranges import Ranges
from harness.checkpoint.restore.visibility import RankView
from harness.distributed.rank_values import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None,
        [True, 3, 2**70, "text", -math.inf, 1e-300],
        (1, ("a", [])),
        {"x": {1: "one", (2, 3): b"\x00\xff"}},
        {1, 2},
        Path("/runs/a"),
        TensorSpec("model", "w", "F32", (2, 3)),
        [RankView("node", None)],
        b"",
        FileRecord("model.safetensors", 7, Ranges([3, 4], [0, 1], bytes(range(32)))),
    ],
    ids=repr,
)
def test_value_is_the_same_when_it_arrives(value: Any) -> None:
    found = decode(encode(value))
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.tensor(3, dtype=torch.int16),
        torch.full((3,), 0.5, dtype=torch.bfloat16),
        torch.full((2,), 1 + 2j, dtype=torch.complex64),
        torch.tensor([True, False]),
        torch.empty(0, 4, dtype=torch.float64),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_tensor_is_the_same_when_it_arrives(tensor: torch.Tensor) -> None:
    before, found, after = decode(encode([b"before", tensor, "after"]))
    assert (before, after) == (b"before", "after")
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)
    found.zero_()  # memory of its own


def test_numbers_of_numpy_arrive_as_pythons() -> None:
    assert decode(encode([np.int64(3), np.float32(0.5)])) == [3, 0.5]


class Own(NamedTuple):
    x: int


@pytest.mark.parametrize("value", [Own(1), object(), [print]], ids=["own", "object", "function"])
def test_error_names_the_class_when_it_cannot_be_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent to another rank"):
        encode(value)


def framed(value: Any) -> bytes:
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps([1]),
        b"",
        framed({"record": ["subprocess.Popen", [["true"]]]}),
        framed({"record": ["harness.distributed.launch_identity.socket", []]}),
        framed({"record": ["harness.tracking.publisher.launcher.start_publisher", ["/tmp", {}]]}),
        framed({"record": ["harness.distributed.collectives.Collectives", [0, 1]]}),
        framed({"call": []}),
        framed({"tuple": [], "set": []}),
        framed({"tensor": ["load", [1], 4]}),
        framed({"bytes": 4}),
        framed({"bytes": -4}),
    ],
    ids=lambda data: data[8:60].decode(errors="replace") or "empty",
)
def test_bytes_are_refused_when_they_are_no_value(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(data)


def test_nothing_of_ours_unpickles_what_a_process_sends() -> None:
    root = Path(__file__).parents[2]
    calls = ("pickle.load", "object_list(", "gather_object(", "multiprocessing.connection", " torch.load(")
    found = {
        f"{path.relative_to(root)}: {call}"
        for package in ("harness", "launch")
        for path in (root / package).rglob("*.py")
        for call in calls
        if call in path.read_text()
    }
    assert not found
