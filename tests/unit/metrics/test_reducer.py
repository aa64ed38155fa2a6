from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import MetricError
from harness.metrics.reducer import Reducer, WeightedSums

numbers = st.floats(-1e6, 1e6, width=32)
weights = st.one_of(st.just(0.0), st.floats(1e-3, 1e4), st.integers(1, 512).map(float))
points = st.lists(st.tuples(st.sampled_from(["a", "b/c"]), numbers, weights, st.booleans()), max_size=40)


def reduce(sums: WeightedSums, step: int = 1) -> dict[str, float]:
    reducer = Reducer(None, ())
    reducer.start(sums, step, {})
    reduced = reducer.finish()
    assert reduced is not None and reduced.step == step
    return dict(reduced.values)


@pytest.fixture(params=[False, True], ids=["host", "device"])
def sums(request: pytest.FixtureRequest) -> WeightedSums:
    """Both ways: tensors in host memory are read at once, a device's are held."""
    return WeightedSums(holds_all=request.param)


@given(points, st.booleans())
def test_mean_equals_float64_reference_when_weighted(
    logged: list[tuple[str, float, float, bool]], holds_all: bool
) -> None:
    sums = WeightedSums(holds_all=holds_all)
    for name, value, weight, as_tensor in logged:
        sums.add({name: torch.tensor(value) if as_tensor else value}, weight)
    means = reduce(sums)
    counted = {name for name, _, weight, _ in logged if weight}
    assert means.keys() == counted
    for name in counted:
        own = [(value, weight) for n, value, weight, _ in logged if n == name]
        total_weight = math.fsum(w for _, w in own)
        reference = math.fsum(v * w for v, w in own) / total_weight
        scale = math.fsum(abs(v) * w for v, w in own) / total_weight
        assert abs(means[name] - reference) <= 1e-12 * scale


def test_mean_equals_reference_when_more_is_logged_than_is_held_back() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(1000, generator=generator)
    sums = WeightedSums()
    for index, value in enumerate(values):
        sums.add({"x": value}, index + 1)
    expected = (values.double() * torch.arange(1, 1001)).sum() / (1000 * 1001 / 2)
    assert reduce(sums)["x"] == pytest.approx(expected.item(), rel=1e-12)


def test_mean_is_not_a_mean_of_means_when_batches_are_uneven(sums: WeightedSums) -> None:
    sums.add({"loss": torch.tensor(1.0)}, 3)
    sums.add({"loss": torch.tensor(5.0)}, 1)
    assert reduce(sums) == {"loss": 2.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_any_dtype_is_taken_when_logged(dtype: torch.dtype, sums: WeightedSums) -> None:
    sums.add({"x": torch.tensor(1, dtype=dtype)}, 2)
    sums.add({"x": torch.tensor(0, dtype=dtype)}, 2)
    assert reduce(sums) == {"x": 0.5}


def test_no_precision_is_lost_when_16_bit_losses_are_summed(sums: WeightedSums) -> None:
    for _ in range(300):
        sums.add({"x": torch.tensor(1.0009765625, dtype=torch.float16)}, 16)
    assert reduce(sums) == {"x": 1.0009765625}


def test_tensor_of_one_element_is_taken_when_it_has_dimensions(sums: WeightedSums) -> None:
    sums.add({"x": torch.full((1, 1), 3.0)})
    assert reduce(sums) == {"x": 3.0}


def test_graph_is_let_go_when_a_loss_is_logged() -> None:
    freed: list[bool] = []

    class Notice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
            ctx.witness = Witness()  # type: ignore[attr-defined]
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor) -> torch.Tensor:
            return gradients[0]

    class Witness:
        def __del__(self) -> None:
            freed.append(True)

    loss = Notice.apply(torch.tensor(2.0, requires_grad=True))
    sums = WeightedSums()
    sums.add({"loss": loss})
    del loss
    assert freed == [True]
    assert reduce(sums) == {"loss": 2.0}


def test_value_is_kept_when_an_inference_tensor_changes_afterwards(sums: WeightedSums) -> None:
    with torch.inference_mode():
        value = torch.tensor(2.0)
        sums.add({"x": value})
        value.add_(1.0)
    assert reduce(sums) == {"x": 2.0}


def test_error_names_the_metric_when_a_tensor_was_changed_in_place() -> None:
    sums = WeightedSums(holds_all=True)
    running = torch.tensor(1.0)
    sums.add({"train/loss": running})
    running.add_(1.0)
    with pytest.raises(MetricError, match=r"train/loss: the tensor was changed in place"):
        sums.pop()


def test_value_at_the_time_of_logging_is_taken_when_a_host_tensor_is_changed_afterwards() -> None:
    sums = WeightedSums()
    running = torch.tensor(1.0)
    sums.add({"train/loss": running})
    running.add_(1.0)
    assert reduce(sums) == {"train/loss": 1.0}


def test_error_names_metric_and_shape_when_a_tensor_is_no_single_number() -> None:
    with pytest.raises(MetricError, match=r"acc: must be a single number, got a tensor of shape \(2, 3\)"):
        WeightedSums().add({"acc": torch.zeros(2, 3)})


@pytest.mark.parametrize("weight", [-1.0, math.nan])
def test_error_is_told_when_a_weight_is_negative_or_nan(weight: float) -> None:
    with pytest.raises(MetricError, match="weight: must be 0 or more"):
        WeightedSums().add({"x": 1.0}, weight)


def test_nothing_is_taken_when_the_weight_is_zero(sums: WeightedSums) -> None:
    sums.add({"x": math.nan, "y": torch.tensor(math.inf)}, 0)
    assert reduce(sums) == {}


@pytest.mark.parametrize("as_tensor", [True, False])
def test_nan_reaches_the_mean_when_one_value_is_nan(as_tensor: bool, sums: WeightedSums) -> None:
    sums.add({"x": 1.0})
    sums.add({"x": torch.tensor(math.nan) if as_tensor else math.nan})
    assert math.isnan(reduce(sums)["x"])


def test_sums_start_from_nothing_when_taken(sums: WeightedSums) -> None:
    sums.add({"x": torch.tensor(1.0), "y": 2.0})
    assert reduce(sums) == {"x": 1.0, "y": 2.0}
    sums.add({"x": torch.tensor(5.0)})
    assert reduce(sums) == {"x": 5.0}


def test_finish_gives_nothing_when_nothing_was_started() -> None:
    reducer = Reducer(None, ())
    assert reducer.finish() is None
    reducer.start(WeightedSums(), 3, {})
    assert reducer.finish() is not None
    assert reducer.finish() is None


def test_values_of_the_next_window_stay_out_when_a_window_is_on_its_way() -> None:
    reducer, sums = Reducer(None, ()), WeightedSums()
    sums.add({"x": 1.0})
    reducer.start(sums, 10, {})
    sums.add({"x": 9.0})
    first = reducer.finish()
    reducer.start(sums, 20, {})
    second = reducer.finish()
    assert first is not None and second is not None
    assert (first.step, first.values, second.step, second.values) == (10, {"x": 1.0}, 20, {"x": 9.0})


def test_gauges_have_one_value_when_there_is_one_rank() -> None:
    reducer = Reducer(None, ("a", "b"))
    reducer.start(WeightedSums(), 1, {"a": 1, "b": 2.5, "c": 3})
    reduced = reducer.finish()
    assert reduced is not None
    assert reduced.gauges == {"a": (1.0,), "b": (2.5,)}


def test_invariant_is_checked_when_a_window_is_started_twice() -> None:
    reducer = Reducer(None, ())
    reducer.start(WeightedSums(), 1, {})
    with pytest.raises(AssertionError):
        reducer.start(WeightedSums(), 2, {})
