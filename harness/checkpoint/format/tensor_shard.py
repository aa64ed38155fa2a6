"""The shard of a logical tensor that one rank holds, and the place from which each save reads it."""

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
    """`num_items` consecutive elements, from `logical` on in the logical tensor and `local` on in this rank's."""

    logical: int
    local: int
    num_items: int


@dataclass(frozen=True, slots=True)
class TensorShard:
    """One logical tensor as this rank holds it.

    Args:
        spec: of the tensor in the file.
        holder: a module's parameters or an optimizer's state, in which each save looks up the live tensor, so that a
            tensor that was replaced since the plan is noticed.
        key: in `holder`.
        ranges: held by this rank, in the order of the logical tensor; other ranks may hold them too.
        is_volatile: it may change before the next optimizer step (a buffer, a frozen parameter, a plain number), so it
            is copied before `save` returns.
        dtype: of the live tensor; None: a plain number.
        shape: of the live tensor or DTensor in the holder.
    """

    spec: TensorSpec
    holder: Any
    key: Any
    ranges: tuple[ElementRange, ...]
    is_volatile: bool = False
    dtype: torch.dtype | None = None
    shape: torch.Size | None = None

    def is_as_planned(self) -> bool:
        """Whether the holder still has a value of the planned type and shape."""
        value = self.holder[self.key]
        if isinstance(value, Tensor):
            return self.dtype == value.dtype and self.shape == value.shape
        return self.dtype is None and isinstance(value, _NUMBERS.get(self.spec.dtype, ()))

    def live(self) -> Any:
        """The current tensor (the local part of a DTensor) or plain number."""
        value = self.holder[self.key]
        return value._local_tensor if isinstance(value, DTensor) else value


# Types of a plain number, by the type in which it is written.
_NUMBERS: dict[str, tuple[type, ...]] = {"F64": (float,), "I64": (int,)}


def shard_of(
    spec: TensorSpec, place: tuple[Any, Any], ranges: tuple[ElementRange, ...], *, is_volatile: bool = False
) -> TensorShard:
    """A shard of the value that is at `place`, a holder and a key, now."""
    value = place[0][place[1]]
    dtype, shape = (value.dtype, value.shape) if isinstance(value, Tensor) else (None, None)
    return TensorShard(spec, place[0], place[1], ranges, is_volatile, dtype, shape)


def spec_of(section: Section, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorSpec:
    """The specification of a tensor in the file.

    Args:
        section: weights or optimizer.
        name: in the file.
        value: the live tensor.
        shape: logical.
        dtype: in which a floating-point tensor is written; None: its own.

    Raises:
        CheckpointError: if safetensors has no such type, or the tensor is sparse or made of several tensors.
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
    """The specification of a plain number, in 64 bits, so that it is not rounded."""
    return TensorSpec(section, name, "F64" if isinstance(value, float) else "I64", ())


def full_range(value: Tensor) -> tuple[ElementRange, ...]:
    """The range of a tensor that this rank holds completely."""
    count = value.numel()
    return (ElementRange(0, 0, count),) if count else ()


def scalar_range() -> tuple[ElementRange, ...]:
    """The range of a plain number."""
    return (ElementRange(0, 0, 1),)


def clipped_range(logical_start: int, local_start: int, count: int, limit: int) -> tuple[ElementRange, ...]:
    """A range without the elements behind the logical tensor's end, which are padding."""
    count = min(count, limit - logical_start)
    return (ElementRange(logical_start, local_start, count),) if count > 0 else ()
