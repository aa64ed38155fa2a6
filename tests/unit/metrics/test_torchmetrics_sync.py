from __future__ import annotations

import pytest
import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from harness.distributed.collectives import Collectives
from harness.errors import MetricError
from harness.metrics.torchmetrics_sync import compute_over_ranks


class Kept(Metric):
    """Keeps a list state, and gives several values."""

    full_state_update = False
    values: list[torch.Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: torch.Tensor) -> None:
        self.values.append(values)

    def compute(self) -> dict[str, torch.Tensor]:
        joined = torch.cat(self.values)
        return {"low": joined.min(), "high": joined.max()}


def test_values_are_those_of_the_objects_when_there_is_one_rank() -> None:
    predictions, targets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 0])
    accuracy = MulticlassAccuracy(num_classes=3, average="micro")
    mean = MeanMetric()
    accuracy.update(predictions, targets)
    mean.update(torch.tensor(3.0), weight=2.0)
    mean.update(torch.tensor(0.0), weight=1.0)
    values = compute_over_ranks(Collectives(0, 1), {"eval/acc": accuracy, "eval/mean": mean})
    assert values == pytest.approx({"eval/acc": 0.75, "eval/mean": 2.0})


def test_names_have_parts_when_an_object_gives_several_values() -> None:
    kept = Kept()
    kept.update(torch.tensor([3.0, 1.0]))
    kept.update(torch.tensor([7.0]))
    assert compute_over_ranks(Collectives(0, 1), {"eval/kept": kept}) == {"eval/kept/low": 1.0, "eval/kept/high": 7.0}


def test_object_starts_again_when_computed() -> None:
    mean = MeanMetric()
    for value in (1.0, 5.0):
        mean.update(value)
        assert compute_over_ranks(Collectives(0, 1), {"m": mean}) == {"m": value}


def test_error_names_the_object_when_it_gives_no_single_number() -> None:
    matrix = MulticlassConfusionMatrix(num_classes=2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(MetricError, match=r"eval/matrix: must compute one number, gives shape \(2, 2\)"):
        compute_over_ranks(Collectives(0, 1), {"eval/matrix": matrix})


def test_nothing_is_exchanged_when_there_are_no_objects() -> None:
    assert compute_over_ranks(Collectives(0, 1), {}) == {}
