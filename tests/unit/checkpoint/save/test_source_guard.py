from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.checkpoint.save.source_guard import GuardedTensor, SourceGuard

Write = Callable[[Tensor], object]


def by_inference_mode(weight: Tensor) -> None:
    with torch.inference_mode():
        weight.add_(1)


IN_PLACE: dict[str, Write] = {
    "copy": lambda weight: weight.copy_(torch.zeros_like(weight)),
    "one element": lambda weight: weight.view(-1)[7].add_(1),
    "one row by a view": lambda weight: weight.detach()[1].zero_(),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "lerp": lambda weight: weight.lerp_(torch.zeros_like(weight), 0.5),
    "inference mode": by_inference_mode,
}
UNCOUNTED: dict[str, Write] = {
    "data": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "numpy": lambda weight: weight.detach().numpy().fill(0),
    "data in place": lambda weight: weight.data.clamp_(-0.01, 0.01),
}


def guarded(source: Tensor, *, is_weight: bool = True) -> tuple[SourceGuard, Tensor]:
    """A guard of one source, and the memory that it is to be copied into."""
    staging = torch.zeros(source.numel() * source.itemsize, dtype=torch.uint8)
    target = staging.view(source.dtype).view(source.shape)
    return SourceGuard([GuardedTensor("fc.weight", (source,), [(source.detach(), target)], is_weight)]), target


def weight_of(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(50, 40).to(dtype))


@pytest.mark.parametrize("kind", IN_PLACE)
def test_version_is_seen_when_a_weight_is_written_in_place(kind: str) -> None:
    weight = weight_of()
    guard, _ = guarded(weight)
    guard.arm()
    assert guard.find_written() is None
    with torch.no_grad():
        IN_PLACE[kind](weight)
    assert guard.find_written() == "fc.weight"


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_copy_is_torn_when_a_write_is_not_counted(kind: str) -> None:
    weight = weight_of()
    before = weight.detach().clone()
    guard, target = guarded(weight)
    guard.arm()
    UNCOUNTED[kind](weight)
    target.copy_(weight.detach())
    # Written back before anybody looks again: the copy is what counts.
    weight.data.copy_(before)
    assert guard.find_written() is None
    assert guard.find_torn_copy() == "fc.weight"


def test_copy_is_torn_when_a_write_reaches_its_end_alone() -> None:
    weight = weight_of()
    guard, target = guarded(weight)
    guard.arm()
    weight.data[25:].zero_()
    target.copy_(weight.detach())
    assert guard.find_torn_copy() == "fc.weight"


@pytest.mark.parametrize("kind", UNCOUNTED)
def test_check_sees_uncounted_writes_when_it_compares_samples(kind: str) -> None:
    weight = weight_of()
    guard, _ = guarded(weight)
    guard.compares_samples = True
    guard.arm()
    guard.check()
    assert guard.written is None
    UNCOUNTED[kind](weight)
    guard.check()
    assert guard.written == "fc.weight"


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 5).t(),
    "bfloat16": lambda: torch.randn(33).bfloat16(),
    "bool": lambda: torch.rand(9) > 0.5,
    "complex": lambda: torch.randn(5, dtype=torch.complex64),
    "int64": lambda: torch.arange(1000),
    "no dimension": lambda: torch.tensor(3.5),
    "one element, odd stride": lambda: torch.randn(22)[::11][:1],
    "part of a storage": lambda: torch.randn(100)[17:60],
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_copy_is_whole_when_nothing_is_written(kind: str) -> None:
    source = LAYOUTS[kind]()
    guard, target = guarded(source, is_weight=False)
    guard.arm()
    target.copy_(source)
    guard.check()
    assert guard.find_torn_copy() is None
    assert guard.written is None
    # The next save of other values.
    source.data.copy_(torch.ones_like(source) + source)
    guard.arm()
    target.copy_(source)
    assert guard.find_torn_copy() is None


@pytest.mark.parametrize("kind", [kind for kind in LAYOUTS if kind != "bool"])
def test_copy_is_torn_when_all_of_it_is_written(kind: str) -> None:
    source = LAYOUTS[kind]()
    guard, target = guarded(source)
    guard.arm()
    source.data.copy_(torch.ones_like(source) + source)
    target.copy_(source)
    assert guard.find_torn_copy() == "fc.weight"


def test_copy_of_another_type_is_compared_as_it_is_cast() -> None:
    weight = weight_of()
    target = torch.zeros(weight.shape, dtype=torch.bfloat16)
    guard = SourceGuard([GuardedTensor("fc.weight", (weight,), [(weight.detach(), target)])])
    guard.arm()
    target.copy_(weight.detach())
    assert guard.find_torn_copy() is None
    weight.data.mul_(2)
    target.copy_(weight.detach())
    assert guard.find_torn_copy() == "fc.weight"


def test_copy_is_whole_when_the_source_is_conjugated() -> None:
    source = torch.randn(50, dtype=torch.complex64).conj()
    guard, target = guarded(source)
    guard.arm()
    target.copy_(source)
    assert guard.find_torn_copy() is None


def test_written_weight_is_named_when_there_are_thousands() -> None:
    sources = [torch.randn(64) for _ in range(1500)]
    targets = [torch.zeros(64) for _ in sources]
    pairs = zip(sources, targets, strict=True)
    guard = SourceGuard(
        [
            GuardedTensor(f"layer.{number}", (source,), [(source, target)])
            for number, (source, target) in enumerate(pairs)
        ]
    )
    guard.arm()
    sources[1234].data.add_(1)
    torch._foreach_copy_(targets, sources)
    assert guard.find_torn_copy() == "layer.1234"


def test_written_state_is_found_when_there_are_thousands() -> None:
    sources = [torch.randn(64) for _ in range(1500)]
    targets = [torch.zeros(64) for _ in sources]
    pairs = zip(sources, targets, strict=True)
    guard = SourceGuard([GuardedTensor(f"exp_avg.{number}", (), [pair], False) for number, pair in enumerate(pairs)])
    guard.arm()
    torch._foreach_mul_(sources, 2.0)
    torch._foreach_copy_(targets, sources)
    assert guard.find_torn_copy() == "exp_avg.0"
