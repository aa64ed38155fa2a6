"""What a rank holds of each logical tensor, and where its memory is looked up at each save."""

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
    """Consecutive elements: `num_items` of them, from `logical` in the logical tensor and `local` in this rank's."""

    logical: int
    local: int
    num_items: int


@dataclass(frozen=True, slots=True)
class TensorShard:
    """One logical tensor as this rank holds it.

    Args:
        spec: what is in the file.
        holder: where the live tensor is looked up each time, by `key`: a module's parameters, an
            optimizer's state. A tensor that was replaced since the plan is thus noticed.
        key: in `holder`.
        runs: what this rank holds, in the order of the logical tensor; other ranks may hold it too.
        at_once: it may change before the next optimizer step (a buffer, a frozen parameter, a plain
            number), so it is copied before `save` returns.
        dtype: of the live tensor; None: a plain number.
        shape: of the live tensor or DTensor as the holder has it.
    """

    spec: TensorSpec
    holder: Any
    key: Any
    runs: tuple[ElementRange, ...]
    at_once: bool = False
    dtype: torch.dtype | None = None
    shape: torch.Size | None = None

    def is_as_planned(self) -> bool:
        """Whether the holder still has the kind of thing there that the plan was made for."""
        value = self.holder[self.key]
        if isinstance(value, Tensor):
            return self.dtype == value.dtype and self.shape == value.shape
        return self.dtype is None and isinstance(value, _NUMBERS.get(self.spec.dtype, ()))

    def live(self) -> Any:
        """The tensor (a DTensor's local part), or the plain number, as it is now."""
        value = self.holder[self.key]
        return value._local_tensor if isinstance(value, DTensor) else value


# Of a plain number, by the type that it is written as.
_NUMBERS: dict[str, tuple[type, ...]] = {"F64": (float,), "I64": (int,)}


def source_of(
    spec: TensorSpec, place: tuple[Any, Any], runs: tuple[ElementRange, ...], *, at_once: bool = False
) -> TensorShard:
    """A source, with the kind of thing that is there now."""
    value = place[0][place[1]]
    dtype, shape = (value.dtype, value.shape) if isinstance(value, Tensor) else (None, None)
    return TensorShard(spec, place[0], place[1], runs, at_once, dtype, shape)


def spec_of(section: Section, name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype | None) -> TensorSpec:
    """The specification of a tensor that is written as `dtype` (None, or not floating point: as it is).

    Raises:
        CheckpointError: if safetensors has no such type, it is sparse, or it is made of several tensors.
    """
    local = value._local_tensor if isinstance(value, DTensor) else value
    if is_traceable_wrapper_subclass(local):
        raise CheckpointError(
            f"{name}: is a {type(local).__name__}, a tensor made of others, which cannot be saved; convert it to a "
            "plain tensor, or leave it out"
        )
    if local.layout is not torch.strided:
        remedy = "keep it as a dense one"
        if section == "optimizer":
            remedy = "use checkpoint.save_weights_only, or an optimizer with a dense state, such as SparseAdam"
        raise CheckpointError(f"{name}: is a sparse tensor ({local.layout}), which cannot be saved; {remedy}")
    kept: torch.dtype = value.dtype
    if dtype is not None and kept.is_floating_point:
        kept = dtype
    if kept not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name}: safetensors has no type for {kept}; convert it, or register it with persistent=False if it is a "
            "buffer"
        )
    return TensorSpec(section, name, DTYPE_NAMES[kept], shape)


def number_spec(section: Section, name: str, value: float) -> TensorSpec:
    """The specification of a plain number: 64 bits, so that nothing is rounded."""
    return TensorSpec(section, name, "F64" if isinstance(value, float) else "I64", ())


def whole(value: Tensor) -> tuple[ElementRange, ...]:
    """The run of a tensor that this rank holds all of."""
    count = value.numel()
    return (ElementRange(0, 0, count),) if count else ()


def whole_number() -> tuple[ElementRange, ...]:
    """The run of a plain number."""
    return (ElementRange(0, 0, 1),)


def overlap(logical_start: int, local_start: int, count: int, limit: int) -> tuple[ElementRange, ...]:
    """A run cut off at the logical tensor's end: what lies behind it is padding."""
    count = min(count, limit - logical_start)
    return (ElementRange(logical_start, local_start, count),) if count > 0 else ()
