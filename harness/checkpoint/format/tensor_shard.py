"""Describe the shard of a logical tensor that one rank holds, and where each save reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from harness.checkpoint.format.layout import Section, TensorSpec
from harness.errors import CheckpointError

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class ElementRange(NamedTuple):
    """`num_items` consecutive elements, starting at `logical` in the logical and at `local` in this rank's tensor."""

    logical: int
    local: int
    num_items: int


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Describe this rank's shard of one logical tensor.

    Args:
        spec: the tensor in the file.
        holder: a module's dictionary or an optimizer's state. Each save looks up ``holder[key]``, so a tensor that was
            replaced after planning is detected.
        key: key in `holder`.
        ranges: ranges that this rank holds, in logical order; other ranks may hold them too.
        is_volatile: the value may change before the next optimizer step (a buffer, a frozen parameter, a plain number),
            so it is copied before `save` returns.
        dtype: type of the live tensor; None for a plain number.
        shape: shape of the live tensor (global shape of a DTensor); None for a plain number.
    """

    spec: TensorSpec
    holder: Any
    key: Any
    ranges: tuple[ElementRange, ...]
    is_volatile: bool = False
    dtype: torch.dtype | None = None
    shape: torch.Size | None = None

    def is_as_planned(self) -> bool:
        """Return whether the holder's value still has the planned type and shape."""
        value = self.holder[self.key]
        if isinstance(value, Tensor):
            return self.dtype == value.dtype and self.shape == value.shape
        return self.dtype is None and isinstance(value, _NUMBERS.get(self.spec.dtype, ()))

    def live(self) -> Any:
        """Return the current tensor (the local tensor of a DTensor) or plain number."""
        value = self.holder[self.key]
        return value._local_tensor if isinstance(value, DTensor) else value


# safetensors type -> Python types of the plain numbers written as it.
_NUMBERS: dict[str, tuple[type, ...]] = {"F64": (float,), "I64": (int,)}


def shard_of(
    spec: TensorSpec, place: tuple[Any, Any], ranges: tuple[ElementRange, ...], *, is_volatile: bool = False
) -> TensorShard:
    """Build the shard of the current value at `place`, a (holder, key)."""
    value = place[0][place[1]]
    dtype, shape = (value.dtype, value.shape) if isinstance(value, Tensor) else (None, None)
    return TensorShard(spec, place[0], place[1], ranges, is_volatile, dtype, shape)


def spec_of(section: Section, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorSpec:
    """Build the specification of a tensor of logical shape `shape`. `dtype` overrides a floating-point tensor's type.

    Raises:
        CheckpointError: if safetensors lacks the type, or the tensor is sparse or a wrapper of other tensors.
    """
    local = value._local_tensor if isinstance(value, DTensor) else value
    if is_traceable_wrapper_subclass(local):
        raise CheckpointError(
            f"{name}: is a {type(local).__name__}, a tensor made of others, which cannot be saved; convert it to a "
            "plain tensor, or remove it"
        )
    if local.layout is not torch.strided:
        remedy = "make it dense"
        if section == "optimizer":
            remedy = "use checkpoint.save_weights_only, or an optimizer with a dense state, such as SparseAdam"
        raise CheckpointError(f"{name}: is a sparse tensor ({local.layout}), which cannot be saved; {remedy}")
    written: torch.dtype = value.dtype
    if dtype is not None and written.is_floating_point:
        written = dtype
    if written not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name}: safetensors has no type for {written}; convert it, or register it with persistent=False if it is "
            "a buffer"
        )
    return TensorSpec(section, name, DTYPE_NAMES[written], shape)


def number_spec(section: Section, name: str, value: float) -> TensorSpec:
    """Build the specification of a plain number, in 64 bits to avoid rounding."""
    return TensorSpec(section, name, "F64" if isinstance(value, float) else "I64", ())


def full_range(value: Tensor) -> tuple[ElementRange, ...]:
    """Return the range of a tensor that this rank holds completely; none if the tensor is empty."""
    count = value.numel()
    return (ElementRange(0, 0, count),) if count else ()


def scalar_range() -> tuple[ElementRange, ...]:
    """Return the range of a plain number."""
    return (ElementRange(0, 0, 1),)


def clipped_range(logical_start: int, local_start: int, count: int, limit: int) -> tuple[ElementRange, ...]:
    """Return a range without padding: elements from `limit` on, the end of the logical tensor, are cut off."""
    count = min(count, limit - logical_start)
    return (ElementRange(logical_start, local_start, count),) if count > 0 else ()
