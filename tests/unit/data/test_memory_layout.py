"""Tensors of any layout: read in C order, and written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from harness.data import memory_layout

# A view of 12 numbers -> its elements.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in_order": lambda memory: memory.reshape(3, 4),
    "transposed": lambda memory: memory.reshape(3, 4).t(),
    "channels_last": lambda memory: memory.reshape(1, 2, 2, 3).permute(0, 3, 1, 2),
    "every_second": lambda memory: memory[::2],
    "slice": lambda memory: memory.reshape(3, 4)[1:, 1:3],
    "one_of_many": lambda memory: memory[::11][1:],
    "one_with_dimensions": lambda memory: memory.as_strided((1, 1, 1), (7, 5, 3), 4),
    "no_dimension": lambda memory: memory[5],
    "empty": lambda memory: memory.reshape(3, 4)[:, 2:2],
    "expanded": lambda memory: memory[:3].unsqueeze(1).expand(3, 4),
    "expanded_whole": lambda memory: memory[:1].expand(2, 3),
    "windows": lambda memory: memory.unfold(0, 3, 1),
}
TYPES = [torch.float32, torch.complex64, torch.bool, torch.uint16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_equal_when_copied_in_order(layout: str, dtype: torch.dtype) -> None:
    view = LAYOUTS[layout]
    source, target = view(torch.arange(12).to(dtype)), view(torch.zeros(12).to(dtype))
    ordered = memory_layout.contiguous_copy(source)
    assert ordered.shape == (source.numel(),)
    ordered.view(torch.uint8)
    assert ordered.tolist() == source.flatten().tolist()
    flat = memory_layout.flat_view(target)
    assert (flat is None) == (not target.is_contiguous())
    if flat is None:
        memory_layout.copy_into(target, ordered)
    else:
        flat.view(torch.uint8).copy_(ordered.view(torch.uint8))
    assert torch.equal(target, source)


@pytest.mark.parametrize("layout", ["expanded", "expanded_whole", "windows"])
def test_error_when_shared_elements_get_different_values(layout: str) -> None:
    target = LAYOUTS[layout](torch.zeros(12))
    with pytest.raises(ValueError, match=r"elements that share memory \(shape .*, strides .*\) have different"):
        memory_layout.copy_into(target, torch.arange(target.numel()).float())


def test_nan_is_copied_when_elements_share_memory() -> None:
    target = torch.zeros(1).expand(3)
    memory_layout.copy_into(target, torch.full((3,), torch.nan))
    assert target.isnan().all()


def test_values_are_equal_when_the_target_is_conjugated() -> None:
    target = torch.zeros(2, dtype=torch.complex64).conj()
    assert memory_layout.flat_view(target) is None
    memory_layout.copy_into(target, torch.tensor([1 + 2j, 3 - 1j]))
    assert target.tolist() == [1 + 2j, 3 - 1j]


def test_only_layouts_with_shared_memory_may_overlap() -> None:
    memory = torch.zeros(12)
    found = [name for name, view in LAYOUTS.items() if memory_layout.may_overlap(view(memory))]
    assert found == ["expanded", "expanded_whole", "windows"]


def test_parameters_are_viewable_as_bytes_when_made_contiguous() -> None:
    model = nn.Module()
    names = [name for name in LAYOUTS if "expanded" not in name and name != "windows"]
    for name in names:
        model.register_parameter(name, nn.Parameter(LAYOUTS[name](torch.arange(12.0))))
    memory_layout.make_contiguous(model)
    for name in names:
        parameter = model.get_parameter(name)
        assert torch.equal(parameter, LAYOUTS[name](torch.arange(12.0)))
        if parameter.numel() and parameter.ndim:
            parameter.data.view(torch.uint8)
