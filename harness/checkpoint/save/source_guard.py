"""Detects tensors that are written while a snapshot copies them.

A snapshot that overlaps training assumes that its sources change in an optimizer step and nowhere else. User code
breaks that: evaluation with averaged weights, `load_state_dict`, an optimizer's `train()` and `eval()`, weights that
are normalised in forward. Two checks find it, and each sees what the other does not:

    versions   autograd counts every in-place operation on a tensor, under `no_grad` too
    samples    bytes of the sources at the beginning, compared with the bytes that were copied: they find what the
               counters miss, such as writes by way of `.data`, NumPy or a kernel of the user's own

Every weight in host memory is sampled. Of the optimizer's state, which user code hardly ever writes, and on an
accelerator a bounded number of tensors is. A write by way of `.data` can fall between the samples: see Known limits in
`docs/guides/checkpoints.md`.
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
        counters: the tensors whose version counters its in-place operations advance.
        parts: pairs of a view of the source and a view of the staging memory, of equal shape.
        is_weight: not of the optimizer's state.
    """

    name: str
    counters: tuple[Tensor, ...]
    parts: Sequence[tuple[Tensor, Tensor]]
    is_weight: bool = True


class _Sample(NamedTuple):
    """A few bytes of a source, and of its copy: by address, since a view of each takes 100 times as long to make.

    Not by way of NumPy either: torch does not resize a storage of which an array was made.
    """

    name: str
    source: Tensor
    source_offset: int
    copy_address: int
    num_items: int
    copy_dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of the source."""
        return self.num_items * self.source.itemsize

    @property
    def copy_bytes(self) -> int:
        """Of the copy, which may be of another type."""
        return self.num_items * self.copy_dtype.itemsize


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
        weights = [each for each in tensors if each.is_weight]
        state = [each for each in tensors if not each.is_weight]
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
        self._samples = [*on_host, *on_device]
        self._copies = [_memory(sample.copy_address, sample.copy_bytes) for sample in self._samples]
        self._is_cast = any(sample.source.dtype != sample.copy_dtype for sample in self._samples)
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
            now = b"".join(self._on_host) + _to_host(torch.cat(self._on_device) if self._on_device else None)
            self.written = self._first_difference(self._bytes_at_arm(), now, [each.num_bytes for each in self._samples])

    def _bytes_at_arm(self) -> bytes:
        return self._host_bytes + _to_host(self._device_bytes)

    def _are_in_place(self) -> bool:
        return list(map(Tensor.data_ptr, self._sources)) == self._addresses

    def find_written(self) -> str | None:
        """Name of the first tensor that an in-place operation has written since `arm`; None: there is none."""
        now = self._read_versions()
        if now == self._versions:
            return None
        pairs = zip(self._counter_names, self._versions, now, strict=True)
        return next(name for name, before, after in pairs if before != after)

    def find_torn_copy(self) -> str | None:
        """Name of the first source whose copy is not what the source was at `arm`; None: there is none.

        Once everything is copied, and still in the staging memory.
        """
        before = self._bytes_at_arm()
        if self._is_cast:
            before = self._as_copied(before)
        return self._first_difference(before, b"".join(self._copies), [each.copy_bytes for each in self._samples])

    def _as_copied(self, before: bytes) -> bytes:
        parts: list[bytes] = []
        offset = 0
        for sample in self._samples:
            part = torch.frombuffer(
                bytearray(before[offset : offset + sample.num_bytes]), dtype=torch.uint8, count=sample.num_bytes
            ).view(sample.source.dtype)
            parts.append(part.to(sample.copy_dtype).view(torch.uint8).numpy().tobytes())
            offset += sample.num_bytes
        return b"".join(parts)

    def _first_difference(self, before: bytes, after: bytes, sizes: Sequence[int]) -> str | None:
        if before == after:
            return None
        offset = 0
        for sample, size in zip(self._samples, sizes, strict=True):
            if before[offset : offset + size] != after[offset : offset + size]:
                return sample.name
            offset += size
        return None


def _to_host(data: Tensor | None) -> bytes:
    return b"" if data is None else data.cpu().numpy().tobytes()


def _samples_of(tensor: GuardedTensor, *, is_one: bool) -> Iterator[_Sample]:
    for source, copy in tensor.parts:
        # The bytes of a tensor that is read conjugated or negated are not those of its copy.
        if not source.numel() or source.is_conj() or source.is_neg():
            continue
        for source_item, copy_item, num_items in _positions(source, is_one=is_one):
            yield _Sample(
                tensor.name,
                source,
                source_item * source.itemsize,
                copy.data_ptr() + copy_item * copy.itemsize,
                num_items,
                copy.dtype,
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
    return source.as_strided((sample.num_items,), (1,), first).view(torch.uint8)
