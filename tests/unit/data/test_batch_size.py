from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from harness.data.batch_size import batch_size


@dataclass
class Graphs:
    x: Tensor
    num_graphs: int


@dataclass
class Padded:
    """As detectors have it: a tensor and a mask."""

    tensors: Tensor
    mask: Tensor


class Slotted:
    __slots__ = ("x",)


class Lookup:
    """Any attribute that is not there raises KeyError, as in a class that wraps a dict."""

    def __init__(self, **values: Any) -> None:
        self.data = values

    def __getattr__(self, name: str) -> Any:
        return self.__dict__["data"][name]


class Linked:
    """Refers to itself, as a node of a tree or a batch with its collator does."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.me, self.all = x, self, [self]


class Lengthless:
    """As detectron2's instances that have no fields yet."""

    def __len__(self) -> int:
        raise NotImplementedError("Empty Instances does not support __len__!")


def photos(num: int, width: int = 12) -> list[Tensor]:
    return [torch.zeros(3, 10 + i, width) for i in range(num)]


def same_shape(num: int, *shape: int) -> list[Tensor]:
    return [torch.zeros(shape) for _ in range(num)]


@pytest.mark.parametrize(
    ("batch", "full_size", "size"),
    [
        pytest.param(Graphs(torch.zeros(40, 4), 8), None, 8, id="graphs"),
        pytest.param(Padded(torch.zeros(4, 3, 9, 9), torch.zeros(4, 9, 9)), None, 4, id="own-class"),
        pytest.param([photos(8), torch.zeros(8)], None, 8, id="images-and-labels"),
        pytest.param(
            (tuple(photos(5)), tuple({"boxes": torch.zeros(i + 1, 4)} for i in range(5))), 8, 5, id="detection"
        ),
        pytest.param(photos(8), 8, 8, id="images-alone"),
        pytest.param(same_shape(8, 3, 32, 32), None, 8, id="images-of-one-shape"),
        pytest.param(same_shape(4, 3, 32, 32), 5, 4, id="last-images"),
        pytest.param(same_shape(2, 3, 32, 32), 2, 2, id="two-images"),
        pytest.param(same_shape(2, 3, 32, 32), 5, 3, id="pair-of-masks"),
        pytest.param(same_shape(4, 13, 32, 32), 5, 4, id="last-images-of-13-channels"),
        pytest.param(same_shape(6, 1, 9, 32, 32), None, 6, id="volumes"),
        pytest.param(same_shape(3, 8, 3, 32, 32), None, 8, id="triplets"),
        pytest.param(same_shape(3, 4, 3, 32, 32), 8, 4, id="last-triplets"),
        pytest.param(same_shape(3, 5, 9, 16), 8, 5, id="last-sequences"),
        pytest.param(same_shape(2, 4, 3, 32, 32), 8, 4, id="last-inputs-and-targets"),
        pytest.param([same_shape(2, 3, 32, 32), same_shape(2, 32, 32)], None, 2, id="images-and-masks"),
        pytest.param({"patches": torch.zeros(40, 4), "labels": torch.zeros(5)}, 8, 5, id="last-patches"),
        pytest.param(Lookup(x=torch.zeros(4, 2)), None, 4, id="lookup"),
        pytest.param(Linked(torch.zeros(4, 2)), None, 4, id="linked"),
        pytest.param(Lengthless(), None, 0, id="lengthless"),
        pytest.param([torch.zeros(4, 2), Lengthless()], None, 4, id="lengthless-part"),
        pytest.param([{"image": image, "label": 1} for image in photos(4)], 4, 4, id="not-collated"),
        pytest.param([torch.zeros(8, 4), torch.zeros(8, 4)], 2, 8, id="two-views"),
        pytest.param([torch.zeros(1, 4), torch.zeros(1, 4)], 2, 1, id="last-pair"),
        pytest.param([torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)], 2, 1, id="last-image-and-mask"),
        pytest.param([torch.zeros(1, 7, 9), torch.zeros(1, 5, 9)], 2, 1, id="last-pair-of-sequences"),
        pytest.param(same_shape(3, 2, 7, 9), 3, 2, id="last-triple"),
        pytest.param([torch.zeros(2, n, 9) for n in (5, 7, 4)], 3, 2, id="last-triple-of-shapes"),
        pytest.param(photos(3), 3, 3, id="three-images"),
        pytest.param(same_shape(3, 1, 32, 32), 3, 3, id="three-grey-images"),
        pytest.param(photos(2), 2, 2, id="two-images-of-shapes"),
        pytest.param(same_shape(16, 13, 32, 32), 16, 16, id="images-of-13-channels"),
        pytest.param([{"image": torch.zeros(1, 9 + i, 9)} for i in range(2)], 2, 2, id="two-not-collated"),
        pytest.param([torch.zeros(n) for n in (5, 7, 2)], None, 3, id="sequences"),
        pytest.param({"text": ["a", "b"], "spans": [[1], [2, 3]]}, None, 2, id="dict-of-lists"),
        pytest.param(UserDict({"input_ids": torch.zeros(6, 9)}), None, 6, id="batch-encoding"),
        pytest.param({"patches": torch.zeros(70, 4), "labels": torch.zeros(8)}, 8, 8, id="patches"),
        pytest.param(["one", "two", "three"], None, 3, id="texts"),
        pytest.param(numpy.zeros((7, 2)), None, 7, id="array"),
        pytest.param(
            [pack_sequence([torch.zeros(4), torch.zeros(2), torch.zeros(1)]), torch.zeros(3)], None, 3, id="packed"
        ),
        pytest.param(
            torch.nested.nested_tensor([torch.zeros(2), torch.zeros(5)], layout=torch.jagged), None, 2, id="nested"
        ),
        pytest.param(Slotted(), None, 0, id="unknown"),
    ],
)
def test_size_is_the_number_of_samples_when_nested(batch: Any, full_size: int | None, size: int) -> None:
    assert batch_size(batch, full_size) == size


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        ([torch.zeros(3), torch.zeros(3, 3)], 3),
        ({"a": {"b": torch.zeros(5)}}, 5),
        ({"file": ["a", "b"], "scale": torch.tensor(1.0), "x": torch.zeros(2)}, 2),
        ([], 0),
        ({"text": "words"}, 0),
        (torch.tensor(1.0), 0),
    ],
)
def test_size_is_the_first_dimension_when_there_is_a_tensor(batch: Any, size: int) -> None:
    assert batch_size(batch) == size
