"""How many samples a batch has, whatever it is made of.

The parts of a batch agree on its size where they can: the first dimension of a tensor, the length of a list of samples.
A list of tensors has both. The first rule that applies decides:

1. The one that is the loader's batch size; no batch is larger than that. A pair or a triple of tensors at the top that
   agree on a smaller size is the loader's last batch.
2. The length, if the tensors have one shape with channels first, such as (3, 32, 32): they are images. A pair at the
   top is inputs and targets, whatever its shape.
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

# Of a list of thousands of samples the first ones say what they are.
_NUM_LOOKED_AT = 16
# Of parts within parts: an object may refer to itself.
_MAX_DEPTH = 5
# Of an image: grey, RGB, RGBA.
_NUM_CHANNELS = (1, 3, 4)

# More tensors than that, of three or more dimensions each, are rather samples than fields.
_MAX_TENSOR_FIELDS = 3

# The possible numbers of samples of a value, the likeliest first; empty if the value has no size.
Sizes = tuple[int, ...]


def batch_size(batch: Any, usual: int | None = None) -> int:
    """Number of samples in a batch; 0 where it cannot be told.

    A batch may be a tensor, an array, a `PackedSequence`, a graph batch (``num_graphs``), an object with a size
    (``batch_size``) or a length of its own, or a list, dict or object of such parts.

    Args:
        batch: as the loader gives it.
        usual: samples in a whole batch of the loader on this rank; None if unknown.
    """
    # At each step: the usual batch, a list of tensors, is told at its first item.
    if type(batch) in (list, tuple) and batch and isinstance(batch[0], Tensor) and batch[0].ndim:
        first = batch[0].shape[0] if not batch[0].is_nested else batch[0].size(0)
        if first == usual:
            return first
    sizes = possible_sizes(batch, is_top=True)
    if usual is not None:
        sizes = tuple(size for size in sizes if size <= usual) or sizes
        # Of a pair or a triple the number of fields is a batch size by chance.
        if usual in sizes and not (usual <= _MAX_TENSOR_FIELDS and _are_tensors(batch, usual)):
            return usual
    return sizes[0] if sizes else 0


def possible_sizes(value: Any, *, is_top: bool = False, depth: int = 0) -> Sizes:
    """What a value's number of samples may be; empty if a method of the value's class raises, such as ``__len__``.

    Args:
        value: a batch, or a part of one.
        is_top: whether it is the batch itself: a pair there is inputs and targets, and not two samples.
        depth: number of parts that it is within.
    """
    try:
        return _possible_sizes(value, is_top, depth)
    except Exception:
        # A batch may be of any class, and counting its samples must not end the training.
        return ()


def _are_tensors(batch: Any, count: int) -> bool:
    return isinstance(batch, (list, tuple)) and len(batch) == count and all(isinstance(each, Tensor) for each in batch)


def are_samples(values: Sequence[Any], size: int, *, is_top: bool) -> bool:
    """Whether the items are the samples of a batch, and not its fields.

    Args:
        values: a batch, or a list in it.
        size: number of samples in the batch.
        is_top: whether it is the batch itself.
    """
    if len(values) != size or hasattr(values, "_fields"):
        return False
    # Fields all have the size of the batch; a sample may have it by chance, such as 8 boxes in a batch of 8.
    has_size = [size in sizes for each in values if (sizes := possible_sizes(each))]
    if not any(has_size) or _are_images(values, is_top):
        return True
    return not all(has_size) and _may_be_samples(values, is_top=is_top)


def _are_images(values: Sequence[Any], is_top: bool) -> bool:
    if (is_top and len(values) == 2) or not all(isinstance(each, Tensor) and not each.is_nested for each in values):
        return False
    shapes = {tuple(each.shape) for each in values}
    shape = shapes.pop() if len(shapes) == 1 and len(values) > 1 else ()
    # Of a batch of images the channels are in the second dimension.
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
    """Return an attribute, or None if it is missing: a class's own ``__getattr__`` may raise any error for that."""
    try:
        return getattr(value, name)
    except Exception:
        return None


def _as_size(found: Any) -> int | None:
    """Return a number of samples: an integer, or the first dimension of a shape; None for any other value."""
    if isinstance(found, (tuple, torch.Size)):
        found = found[0] if found else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _sizes_of_sequence(values: Sequence[Any], is_top: bool, depth: int) -> Sizes:
    """Of fields, which have a size each; or of samples, whose number is the length."""
    looked_at = list(islice(values, _NUM_LOOKED_AT))
    parts = [sizes for each in looked_at if (sizes := possible_sizes(each, depth=depth + 1))]
    if not parts:
        is_uniform = len({type(each) for each in looked_at}) == 1
        return (len(values),) if is_uniform and not (is_top and isinstance(values[0], Tensor)) else ()
    found = _agreed(parts)
    if hasattr(values, "_fields") or not _may_be_samples(looked_at, is_top=is_top):
        return found
    is_of_fields = set.intersection(*map(set, parts)) and not _are_images(looked_at, is_top)
    return (*found, len(values)) if is_of_fields else (len(values), *found)


def _may_be_samples(values: Sequence[Any], *, is_top: bool) -> bool:
    """Whether these may be samples of one kind, and not the fields of a batch."""
    if all(isinstance(each, Tensor) for each in values):
        ndims = {each.ndim for each in values}
        # A pair of inputs and targets is what a loader gives unless it is told otherwise.
        return len(ndims) == 1 and (not is_top or min(ndims) >= 3 or len({each.size(0) for each in values}) > 1)
    return all(isinstance(each, Mapping) for each in values) or (
        not is_top and len({type(each) for each in values}) == 1
    )


def _agreed(parts: Iterable[Sizes]) -> Sizes:
    """What all parts may have; where they contradict each other, what any may, the first part's first."""
    known = [sizes for sizes in parts if sizes]
    if not known:
        return ()
    common = set.intersection(*map(set, known))
    union = dict.fromkeys(size for sizes in known for size in sizes)
    # The likeliest by all parts: images of three channels may agree by chance with a sample of three boxes.
    return tuple(sorted(common, key=lambda size: sum(sizes.index(size) for sizes in known)) if common else union)
