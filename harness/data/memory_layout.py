"""Tensors whose elements do not lie one after another in C order: reading them in order, and writing them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flat_view(tensor: Tensor) -> Tensor | None:
    """The tensor's memory with shape (numel,) and stride 1; None if its elements do not lie in C order.

    Not by `view`, which keeps the stride of a dimension of one element. That stride may be anything, and such a view
    cannot be taken as bytes.

    Args:
        tensor: of any shape and type.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.as_strided((tensor.numel(),), (1,))


def contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy with shape (numel,) and stride 1."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.clone(memory_format=torch.contiguous_format).view(-1)


def copy_into(tensor: Tensor, ordered: Tensor) -> None:
    """Write values into a tensor of any layout.

    Args:
        tensor: written to.
        ordered: the values, shape (numel,), in C order.

    Raises:
        ValueError: if elements of the tensor that share memory have different values.
    """
    part, values = tensor.detach(), ordered.view(tensor.shape)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            # All elements along it are one.
            part, values = part.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    part.copy_(values)
    # As bytes, so that a NaN equals itself.
    if may_overlap(tensor) and not torch.equal(contiguous_copy(tensor).view(torch.uint8), ordered.view(torch.uint8)):
        raise ValueError(
            f"elements of it that share memory (shape {list(tensor.shape)}, strides {list(tensor.stride())}) have "
            "different values"
        )


def make_contiguous(model: nn.Module) -> None:
    """Have parameters lie in C order, for DeepSpeed, which takes their memory as bytes when it starts.

    Effects: not collective; main thread, before an optimizer is made.

    Args:
        model: not prepared yet.
    """
    for parameter in model.parameters():
        if parameter.layout != torch.strided:
            continue
        flat = flat_view(parameter)
        ordered = contiguous_copy(parameter) if flat is None else flat
        parameter.data = ordered.view(parameter.shape)


def may_overlap(tensor: Tensor) -> bool:
    """Whether elements may share memory: not if each stride leads beyond all that the smaller ones reach."""
    reached = 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride <= reached:
            return True
        reached += stride * (length - 1)
    return False
