"""Read and write the elements of tensors that are not contiguous, in C order."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def flat_view(tensor: Tensor) -> Tensor | None:
    """Return a view of the tensor's memory, shape (numel,) and stride 1; None if it is not contiguous.

    `Tensor.view` keeps the arbitrary stride of a dimension with one element, so its result cannot be viewed as bytes.
    """
    tensor = tensor.detach()
    if tensor.layout != torch.strided or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    return tensor.as_strided((tensor.numel(),), (1,))


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a copy in C order, shape (numel,) and stride 1."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return tensor.clone(memory_format=torch.contiguous_format).view(-1)


def copy_into(tensor: Tensor, ordered: Tensor) -> None:
    """Copy values of shape (numel,) in C order into a tensor of any layout.

    Raises:
        ValueError: if elements of the tensor that share memory would get different values.
    """
    part, values = tensor.detach(), ordered.view(tensor.shape)
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            # All elements along this dimension share memory.
            part, values = part.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    part.copy_(values)
    # Compared as bytes, so that a NaN equals itself.
    if may_overlap(tensor) and not torch.equal(contiguous_copy(tensor).view(torch.uint8), ordered.view(torch.uint8)):
        raise ValueError(
            f"elements that share memory (shape {list(tensor.shape)}, strides {list(tensor.stride())}) have different "
            "values"
        )


def make_contiguous(model: nn.Module) -> None:
    """Make each parameter contiguous, for DeepSpeed, which reads their memory as bytes.

    Effects: not collective; main thread; before the optimizer is constructed and the model is prepared.
    """
    for parameter in model.parameters():
        if parameter.layout != torch.strided:
            continue
        flat = flat_view(parameter)
        ordered = contiguous_copy(parameter) if flat is None else flat
        parameter.data = ordered.view(parameter.shape)


def may_overlap(tensor: Tensor) -> bool:
    """Whether elements may share memory. They do not if each stride exceeds the extent of all smaller strides."""
    reached = 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride <= reached:
            return True
        reached += stride * (length - 1)
    return False
