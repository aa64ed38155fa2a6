"""Detects tensors that are written while a snapshot copies them.

A snapshot that overlaps training assumes that its sources change in an optimizer step and nowhere else. User code may
break that: evaluation with averaged weights, `load_state_dict`, an optimizer's `train()` and `eval()`, weights that
are normalised in forward. Two checks find such writes; each finds what the other misses:

    versions   autograd counts every in-place operation on a tensor, also under `no_grad`
    samples    bytes of the sources at the start, compared with the bytes that were copied: they find what the
               counters miss, such as writes through `.data`, NumPy or a kernel of the user's own

Every weight in host memory is sampled. Of optimizer state, which user code hardly ever writes, and on an accelerator,
a bounded number of tensors is. A write through `.data` can fall between the samples; it is a known limit.
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
# Three samples of each weight; with more weights than this one sample, because reading three takes milliseconds.
_MANY_WEIGHTS = 200
_MAX_STATE_SAMPLES = 128
# On an accelerator each sample is an argument of a kernel.
_MAX_DEVICE_SAMPLES = 1024


@dataclass(frozen=True)
class GuardedTensor:
    """One source of a snapshot and its copy.

    Args:
        name: in the checkpoint.
        counters: the tensors whose version counters its in-place operations advance.
        parts: pairs of a view of the source and a view of the staging memory, of equal shape.
        is_weight: False for optimizer state.
    """

    name: str
    counters: tuple[Tensor, ...]
    parts: Sequence[tuple[Tensor, Tensor]]
    is_weight: bool = True


class _Sample(NamedTuple):
    """A few bytes of a source and of its copy, by address. Creating views instead takes 100 times as long.

    NumPy arrays are no alternative: torch does not resize a storage that shares memory with one.
    """

    name: str
    source: Tensor
    source_offset: int
    copy_address: int
    num_items: int
    copy_dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size in the source."""
        return self.num_items * self.source.itemsize

    @property
    def copy_bytes(self) -> int:
        """Size in the copy, which may have another dtype."""
        return self.num_items * self.copy_dtype.itemsize


class SourceGuard:
    """Compares the sources of a snapshot with their state at its start.

    Effects: not collective; blocks for about 1 us for each tensor; nothing on disk. The training thread calls `arm`
    and `check`, any thread the others.

    Args:
        tensors: that are copied after `Snapshot.begin` has returned; the guard keeps them alive.

    Attributes:
        compares_samples: whether `check` also compares samples of the sources. False for an overlapped copy: then
            `find_torn_copy` compares them, at no cost to the training thread.
        written: name of the first tensor that `check` found written since `arm`; None if none was.
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
        """Record versions and samples. Nothing may be written from here until everything is copied."""
        self.written = None
        self._versions = self._read_versions()
        self._host_bytes = b"".join(self._on_host)
        self._device_bytes = torch.cat(self._on_device) if self._on_device else None

    def _read_versions(self) -> list[int]:
        return list(map(_VERSION_OF, self._counters))

    def check(self) -> None:
        """Set `written` to what was written since `arm`. Call it last before a step, which writes everything."""
        self.written = self.find_written()
        # A storage that was resized or freed since must not be read; the copy does not depend on it.
        if self.written is None and self.compares_samples and self._are_in_place():
            now = b"".join(self._on_host) + _to_host(torch.cat(self._on_device) if self._on_device else None)
            self.written = self._first_difference(self._bytes_at_arm(), now, [each.num_bytes for each in self._samples])

    def _bytes_at_arm(self) -> bytes:
        return self._host_bytes + _to_host(self._device_bytes)

    def _are_in_place(self) -> bool:
        return list(map(Tensor.data_ptr, self._sources)) == self._addresses

    def find_written(self) -> str | None:
        """Return the name of the first tensor that an in-place operation has written since `arm`, or None."""
        now = self._read_versions()
        if now == self._versions:
            return None
        pairs = zip(self._counter_names, self._versions, now, strict=True)
        return next(name for name, before, after in pairs if before != after)

    def find_torn_copy(self) -> str | None:
        """Return the name of the first source whose copy is not its state at `arm`, or None.

        Call it once everything is copied, while the staging memory still has it.
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
        # Conjugation and negation are flags of the source, so its bytes differ from those of the copy.
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
    """Yield sampled elements, in the middle and unless `is_one` at both ends: source index, copy index, count."""
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
