"""Detects tensors that are written while a snapshot copies them.

A snapshot that overlaps training assumes that its sources change in an optimizer step and nowhere else. User code
breaks that: evaluation with averaged weights, `load_state_dict`, an optimizer's `train()` and `eval()`, weights that
are normalised in forward. Two checks find it, and each sees what the other does not:

    versions   autograd counts every in-place operation on a weight, under `no_grad` too
    samples    bytes of the sources at the beginning, compared with the bytes that were copied: they find what the
               counters miss, such as writes by way of `.data`, NumPy or a kernel of the user's own

Every weight is sampled. Of the optimizer's state, which user code hardly ever writes, a bounded number of tensors is. A
write by way of `.data` to a small part of a tensor can fall between the samples: `docs/checkpoints.md`, Known limits.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_VERSION_OF = operator.attrgetter("_version")
_SAMPLE_BYTES = 16
# Three samples of each weight, or one where there are so many weights that reading them takes milliseconds.
_MANY_WEIGHTS = 200
_MAX_STATE_SAMPLES = 128
# On an accelerator each sample is an argument of a kernel.
_MAX_DEVICE_SAMPLES = 1024


@dataclass(frozen=True)
class GuardedTensor:
    """One source of a snapshot, and where it is copied to.

    Args:
        name: in the checkpoint.
        counters: the tensors whose version counters its in-place operations advance; empty: only samples are taken.
        parts: pairs of a view of the source and a view of the staging memory, of equal shape.
    """

    name: str
    counters: tuple[Tensor, ...]
    parts: Sequence[tuple[Tensor, Tensor]]


class _Sample(NamedTuple):
    """A few bytes of a source, and of its copy: by address, since a view of each takes 100 times as long to make.

    Not by way of NumPy either: torch lets nobody resize a storage of which there was an array.
    """

    name: str
    source: Tensor
    source_offset: int
    copy_address: int
    num_bytes: int


class SourceGuard:
    """Compares the sources of a snapshot with what they were when it began.

    Effects: not collective; blocks for about 1 us for each tensor; nothing on disk. `arm` and `check` are for the
    thread that trains, the others for any thread.

    Args:
        tensors: what is copied after `Snapshot.begin` has returned; each stays alive as long as this.

    Attributes:
        compares_samples: whether `check` compares samples of the sources too. Not while they are still copied: then
            `find_torn_copy` does, and at no cost to the thread that trains.
        written: name of the first tensor that `check` has found to be written since `arm`; None: none was.
    """

    def __init__(self, tensors: Sequence[GuardedTensor]) -> None:
        self._tensors = tensors
        self._counters = [counter for each in tensors for counter in each.counters]
        self._counter_names = [each.name for each in tensors for _ in each.counters]
        weights = [each for each in tensors if each.counters]
        state = [each for each in tensors if not each.counters]
        state = state[:: len(state) // _MAX_STATE_SAMPLES + 1]
        samples = [sample for each in weights for sample in _samples_of(each, is_one=len(weights) > _MANY_WEIGHTS)]
        samples += [sample for each in state for sample in _samples_of(each, is_one=True)]
        on_host = [sample for sample in samples if sample.source.device.type == "cpu"]
        on_device = [sample for sample in samples if sample.source.device.type != "cpu"]
        on_device = on_device[:: len(on_device) // _MAX_DEVICE_SAMPLES + 1]
        self._sources = [sample.source for sample in on_host]
        self._addresses = [source.data_ptr() for source in self._sources]
        self._on_host = [
            _memory(address + sample.source_offset, sample.num_bytes)
            for address, sample in zip(self._addresses, on_host, strict=True)
        ]
        self._on_device = [_device_view(sample) for sample in on_device]
        self._copies = [_memory(sample.copy_address, sample.num_bytes) for sample in (*on_host, *on_device)]
        self._names = [sample.name for sample in (*on_host, *on_device)]
        self._versions: list[int] = []
        self._host_bytes = b""
        self._device_bytes: Tensor | None = None
        self.compares_samples = False
        self.written: str | None = None

    def arm(self) -> None:
        """Record versions and samples: from here on nothing may be written until everything is copied."""
        self.written = None
        self._versions = self._read_versions()
        self._host_bytes = b"".join(self._on_host)
        self._device_bytes = torch.cat(self._on_device) if self._on_device else None

    def _read_versions(self) -> list[int]:
        return list(map(_VERSION_OF, self._counters))

    def check(self) -> None:
        """Keep in `written` what was written since `arm`: the last moment before a step writes everything."""
        self.written = self.find_written()
        # A storage that was resized or freed meanwhile must not be read; it is not what was copied any more.
        if self.written is None and self.compares_samples and self._are_in_place():
            self.written = self._first_difference(self._host_bytes, b"".join(self._on_host))

    def _are_in_place(self) -> bool:
        return list(map(Tensor.data_ptr, self._sources)) == self._addresses

    def find_written(self) -> str | None:
        """Name of the first weight that an in-place operation has written since `arm`; None: there is none."""
        now = self._read_versions()
        if now == self._versions:
            return None
        pairs = zip(self._counter_names, self._versions, now, strict=True)
        return next(name for name, before, after in pairs if before != after)

    def find_torn_copy(self) -> str | None:
        """Name of the first source whose copy is not what the source was at `arm`; None: there is none.

        Once everything is copied, and still in the staging memory.
        """
        device = b"" if self._device_bytes is None else self._device_bytes.cpu().numpy().tobytes()
        return self._first_difference(self._host_bytes + device, b"".join(self._copies))

    def _first_difference(self, before: bytes, after: bytes) -> str | None:
        if before == after:
            return None
        offset = 0
        for name, copy in zip(self._names, self._copies, strict=True):
            end = offset + ctypes.sizeof(copy)
            if before[offset:end] != after[offset:end]:
                return name
            offset = end
        return None


def _samples_of(tensor: GuardedTensor, *, is_one: bool) -> Iterator[_Sample]:
    for source, copy in tensor.parts:
        # Where the copy is of another type, its bytes are no longer those of the source.
        if source.dtype != copy.dtype or not source.numel():
            continue
        for source_item, copy_item, num_items in _positions(source, is_one=is_one):
            yield _Sample(
                tensor.name,
                source,
                source_item * source.itemsize,
                copy.data_ptr() + copy_item * copy.itemsize,
                num_items * source.itemsize,
            )


def _positions(source: Tensor, *, is_one: bool) -> Iterator[tuple[int, int, int]]:
    """Elements of the middle, and of both ends unless one sample is enough: where in the source, the copy, how many."""
    count = source.numel()
    if source.is_contiguous():
        num_items = min(max(1, _SAMPLE_BYTES // source.itemsize), count)
        last = count - num_items
        for first in {last // 2} if is_one else sorted({0, last // 2, last}):
            yield first, first, num_items
        return
    yield 0, 0, 1
    if not is_one:
        end = sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
        yield end, count - 1, 1


@lru_cache
def _array_type(num_bytes: int) -> Any:
    return ctypes.c_char * num_bytes


def _memory(address: int, num_bytes: int) -> Any:
    return _array_type(num_bytes).from_address(address)


def _device_view(sample: _Sample) -> Tensor:
    source = sample.source
    first = source.storage_offset() + sample.source_offset // source.itemsize
    return source.as_strided((sample.num_bytes // source.itemsize,), (1,), first).view(torch.uint8)
