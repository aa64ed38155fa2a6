"""Count the samples in a batch of any structure.

The size of a tensor is its first dimension, and that of a list of samples is its length. A list of tensors has two
possible sizes. The first rule that applies decides:

1. The size that equals the loader's batch size, which no batch exceeds. If the whole batch is a pair or a triple of
   tensors that agree on a smaller size, it is the loader's last batch.
2. The length, if the tensors are images: they have one shape with channels first, such as (3, 32, 32). If the whole
   batch is a pair, it is inputs and targets, of any shape.
3. The first dimension, if it is the same for all; else the length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

# Number of items of a long list that are inspected.
_NUM_INSPECTED = 16
# Limit of the nesting, because an object may refer to itself.
_MAX_DEPTH = 5
# Channels of an image: grey, RGB, RGBA.
_NUM_CHANNELS = (1, 3, 4)

# A list of at most this many tensors may be fields, even if its length equals the batch size.
_MAX_TENSOR_FIELDS = 3

# The possible numbers of samples, the most likely first; empty if the value has no size.
Sizes = tuple[int, ...]


def batch_size(batch: Any, full_size: int | None = None) -> int:
    """Return the number of samples in a batch; 0 if it is unknown.

    A batch may be a tensor, an array, a `PackedSequence`, a graph batch (``num_graphs``), an object with a
    ``batch_size`` or a length, or a list, dict or object of such parts. `full_size` is the number of samples in a full
    batch of the loader on this rank, if known.
    """
    # Fast path: in the usual list of tensors the first item decides.
    if type(batch) in (list, tuple) and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        first = batch[0].shape[0] if not batch[0].is_nested else batch[0].size(0)
        if first == full_size:
            return first
    sizes = possible_sizes(batch, is_top=True)
    if full_size is not None:
        sizes = tuple(size for size in sizes if size <= full_size) or sizes
        # The number of fields of a pair or a triple may equal the batch size by chance.
        if full_size in sizes and not (full_size <= _MAX_TENSOR_FIELDS and _are_tensors(batch, full_size)):
            return full_size
    return sizes[0] if sizes else 0


def possible_sizes(value: Any, *, is_top: bool = False, depth: int = 0) -> Sizes:
    """Return the possible numbers of samples of a batch or a part of it; none if a method of its class raises.

    In a whole batch (`is_top`) a pair is inputs and targets, not two samples.
    """
    try:
        return _possible_sizes(value, is_top, depth)
    except Exception:
        # A batch may be of any class, and an error in its methods must not end the training.
        return ()


def _are_tensors(batch: Any, count: int) -> bool:
    return isinstance(batch, (list, tuple)) and len(batch) == count and all(isinstance(each, Tensor) for each in batch)


def are_samples(values: Sequence[Any], size: int, *, is_top: bool) -> bool:
    """Whether the items of a batch of `size` samples (`is_top`), or of a list in it, are samples and not fields."""
    if len(values) != size or hasattr(values, "_fields"):
        return False
    # All fields have the batch's size. A sample may have it by chance, such as 8 boxes in a batch of 8.
    has_size = [size in sizes for each in values if (sizes := possible_sizes(each))]
    if not any(has_size) or _are_images(values, is_top):
        return True
    return not all(has_size) and _may_be_samples(values, is_top=is_top)


def _are_images(values: Sequence[Any], is_top: bool) -> bool:
    if (is_top and len(values) == 2) or not all(isinstance(each, Tensor) and not each.is_nested for each in values):
        return False
    shapes = {tuple(each.shape) for each in values}
    shape = shapes.pop() if len(shapes) == 1 and len(values) > 1 else ()
    # In a batch of images, the channels are the second dimension.
    return len(shape) >= 3 and shape[0] in _NUM_CHANNELS and shape[1] not in _NUM_CHANNELS


def _possible_sizes(value: Any, is_top: bool, depth: int) -> Sizes:
    if isinstance(value, Tensor):
        return (value.size(0),) if value.ndim else ()
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex)) or depth >= _MAX_DEPTH:
        return ()
    if isinstance(value, PackedSequence):
        return (int(value.batch_sizes[0]),) if len(value.batch_sizes) else ()
    if isinstance(value, (list, tuple)):
        return _sizes_of_sequence(value, is_top, depth)
    for name in ("num_graphs", "batch_size"):
        if (own := _as_size(_attribute(value, name))) is not None:
            return (own,)
    if isinstance(value, Mapping):
        return _agreed(possible_sizes(each, depth=depth + 1) for each in value.values())
    if (shape := _attribute(value, "shape")) is not None:
        own = _as_size(shape)
        return () if own is None else (own,)
    if hasattr(type(value), "__len__"):
        return (len(value),)
    fields = (
        [field.name for field in dataclasses.fields(value)]
        if dataclasses.is_dataclass(value)
        else getattr(value, "__dict__", ())
    )
    return _agreed(possible_sizes(_attribute(value, name), depth=depth + 1) for name in fields)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute; None if it is missing, as ``__getattr__`` may report with any error."""
    try:
        return getattr(value, name)
    except Exception:
        return None


def _as_size(found: Any) -> int | None:
    """Return an integer, or the first dimension of a shape; None for any other value."""
    if isinstance(found, (tuple, torch.Size)):
        found = found[0] if found else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _sizes_of_sequence(values: Sequence[Any], is_top: bool, depth: int) -> Sizes:
    """Return the possible sizes of a list: those of its items if they are fields, its length if they are samples."""
    inspected = list(islice(values, _NUM_INSPECTED))
    parts = [sizes for each in inspected if (sizes := possible_sizes(each, depth=depth + 1))]
    if not parts:
        is_uniform = len({type(each) for each in inspected}) == 1
        return (len(values),) if is_uniform and not (is_top and isinstance(values[0], Tensor)) else ()
    found = _agreed(parts)
    if hasattr(values, "_fields") or not _may_be_samples(inspected, is_top=is_top):
        return found
    is_of_fields = set.intersection(*map(set, parts)) and not _are_images(inspected, is_top)
    return (*found, len(values)) if is_of_fields else (len(values), *found)


def _may_be_samples(values: Sequence[Any], *, is_top: bool) -> bool:
    """Whether the items may be samples of one kind, and not the fields of a batch."""
    if all(isinstance(each, Tensor) for each in values):
        ndims = {each.ndim for each in values}
        # torch's default collate function returns a pair of inputs and targets.
        return len(ndims) == 1 and (not is_top or min(ndims) >= 3 or len({each.size(0) for each in values}) > 1)
    return all(isinstance(each, Mapping) for each in values) or (
        not is_top and len({type(each) for each in values}) == 1
    )


def _agreed(parts: Iterable[Sizes]) -> Sizes:
    """Return the sizes that all parts may have; if none, those of any part, in the order of the parts."""
    known = [sizes for sizes in parts if sizes]
    if not known:
        return ()
    common = set.intersection(*map(set, known))
    union = dict.fromkeys(size for sizes in known for size in sizes)
    # Ranked over all parts, because a sample of three boxes may agree by chance with images of three channels.
    return tuple(sorted(common, key=lambda size: sum(sizes.index(size) for sizes in known)) if common else union)
