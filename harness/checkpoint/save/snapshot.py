"""The copy of what a rank owns, made while the next forward and backward run.

    main thread        save: look the tensors up, copy what may change at once, arm the guard
    background thread  calls of ATen that run without the GIL (CPU), or copies on a side stream (CUDA)
    main thread        the next optimizer step waits at the fence until the copy is done

What may change before the next step (buffers, frozen weights, plain numbers) is copied before `begin` returns. The
rest should change in a step and nowhere else; `source_guard` detects user code that writes it elsewhere.
"""

from __future__ import annotations

import mmap
import operator
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from harness.checkpoint.format.tensor_shard import DTYPES, TensorShard
from harness.checkpoint.save.plan import Piece, Plan
from harness.checkpoint.save.source_guard import GuardedTensor, SourceGuard
from harness.checkpoint.sharding.local_shards import LocalShards
from harness.errors import CheckpointError
from harness.io.standard_streams import occupy_descriptors

# Tensors in one call, which holds the GIL while it unpacks their list.
_CALL_TENSORS = 256
# Bytes in one call, so that the writer has its first bytes soon.
_CALL_BYTES = 16 << 20
_LOCAL_OF = operator.attrgetter("_local_tensor")


class StagingMemory:
    """Host memory for what one rank owns. Another process can map it by its file descriptor.

    Effects: not collective; blocks while the pages are allocated; nothing on disk.

    Args:
        size_bytes: rounded up to one page.
        pinned: page-lock it, for copies from a CUDA device.

    Raises:
        CheckpointError: if the memory cannot be page-locked.
        OSError: if there is not enough memory.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = max(size_bytes, mmap.PAGESIZE)
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, self.size_bytes)
        self._map = mmap.mmap(self.descriptor, self.size_bytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        # Allocates every page now, so that the first save does not pay for it.
        self.bytes.zero_()
        self._pinned = pinned
        if pinned:
            _cudart("cudaHostRegister", self.bytes.data_ptr(), self.size_bytes, 0)

    def close(self) -> None:
        """Free the memory. A process that has mapped it keeps its mapping."""
        if self._pinned:
            _cudart("cudaHostUnregister", self.bytes.data_ptr())
            self._pinned = False
        os.close(self.descriptor)


def _anonymous_file() -> int:
    occupy_descriptors()  # the writer process inherits this descriptor beside its own standard streams
    if hasattr(os, "memfd_create"):
        return os.memfd_create("harness-staging", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # not Linux
        return os.dup(file.fileno())


def _cudart(function: str, *arguments: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(getattr(runtime, function)(*arguments))
    if code != 0:
        raise CheckpointError(f"{function}: host memory for checkpoints cannot be page-locked (CUDA error {code})")


class Gate(Protocol):
    """Holds the next optimizer step back until it is opened; see `Fence`."""

    def open(self, event: torch.cuda.Event | None = None) -> None:
        """Let the next step run; on CUDA after `event`. Any thread."""


class ReadySink(Protocol):
    """Consumes the staging memory while it is filled; see `WriterProcess`."""

    def report_ready(self, num_bytes: int) -> None:
        """Report that the first `num_bytes` of the memory are copied."""


class PendingCopy(Protocol):
    """The part of a copy that is left for the background thread."""

    def run(self, gate: Gate, sink: ReadySink) -> None:
        """Copy, and block until the memory holds everything.

        Raises:
            RuntimeError: if a copy fails, on this rank alone.
        """


class Snapshot:
    """Copies the pieces of a plan into staging memory.

    Effects: not collective; main thread, except for the copy that `begin` returns; `begin` blocks for what is copied
    at once; nothing on disk.

    Args:
        shards: what this rank holds.
        plan: which pieces to copy, and where to.
        staging: the memory.
        device: of the model.

    Attributes:
        guard: of what is copied after `begin` has returned; `begin` arms it.
    """

    guard: SourceGuard

    def __init__(self, shards: LocalShards, plan: Plan, staging: StagingMemory, device: torch.device) -> None:
        self._shards = shards
        self._device = device
        self._staging_bytes = staging.size_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        by_source: dict[int, list[Piece]] = {}
        for piece in plan.pieces:
            by_source.setdefault(piece.source, []).append(piece)
        # No rank copies these, so each rank checks by itself whether they are still empty.
        self._empty = [source for source in shards.tensors if source.spec.num_items == 0]
        self._copies = [_Copies(shards.tensors[index], pieces, staging) for index, pieces in by_source.items()]
        self._sort()

    def look_up(self) -> bool:
        """Find where all tensors are now. Returns whether all of them have the shape that was planned."""
        if not self._shards.is_current:
            return False
        try:
            return self._look_up()
        except (KeyError, IndexError, AttributeError):
            return False  # a tensor is gone

    def _look_up(self) -> bool:
        if not all(source.is_as_planned() for source in self._empty):
            return False
        moved = self._unknown if self._known.is_current() else self._copies
        if not all([copies.look_up() for copies in moved]):
            return False
        if moved is self._copies or any(copies.local is not None for copies in moved):
            self._sort()
        return True

    def _sort(self) -> None:
        """Divide the copies into those that are compared with the last lookup and those that are looked up again."""
        self._known = _Known([copies for copies in self._copies if copies.local is not None])
        self._unknown = [copies for copies in self._copies if copies.local is None]
        self._at_once = [copies for copies in self._copies if copies.is_at_once]
        later = [copies for copies in self._copies if not copies.is_at_once]
        self._batches = _batches(later, self._staging_bytes)
        self.guard = SourceGuard([copies.guarded() for copies in later])

    def begin(self) -> PendingCopy:
        """Copy at once what may change before the next optimizer step. Call `look_up` first.

        Returns:
            The copy of the rest, for the background thread.
        """
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for copies in self._at_once:
            targets += copies.targets
            values += copies.values
        with torch.no_grad():
            if targets:
                torch._foreach_copy_(targets, values, non_blocking=self._stream is not None)
            self.guard.arm()
        batches, stream = self._batches, self._stream
        if stream is None:
            return _HostCopy(batches)
        at_once = torch.cuda.current_stream(self._device).record_event()
        return _DeviceCopy(stream, at_once, batches)


class _Copies:
    """The copies of one source. The targets are fixed, the values are looked up at each save.

    Attributes:
        targets: parts of the staging memory, with the dtype that is written.
        values: what is copied into them: views, which keep the memory of the source alive.
        value: what the holder holds.
        local: this rank's tensor of it; None if the values must be created at each save.
        is_at_once: whether they are copied before `begin` returns.
    """

    def __init__(self, source: TensorShard, pieces: Sequence[Piece], staging: StagingMemory) -> None:
        self.source = source
        self._pieces = pieces
        dtype, item = DTYPES[source.spec.dtype], source.spec.item_bytes
        self.targets = [
            staging.bytes[piece.staging : piece.staging + piece.num_items * item].view(dtype) for piece in pieces
        ]
        self.values: list[Tensor] = []
        self.value: Any = None
        self.local: Tensor | None = None
        self.is_at_once = source.is_volatile
        self._local_shape: torch.Size | None = None
        self.look_up()

    def pieces(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Yield each piece with its target and its value."""
        return zip(self._pieces, self.targets, self.values, strict=True)

    def guarded(self) -> GuardedTensor:
        """Describe the source for the guard."""
        # An operation on a DTensor advances its own counter, one on its local tensor that tensor's.
        counters = [each for each in (self.value, self.local) if isinstance(each, Tensor)]
        unique = {id(counter): counter for counter in counters}
        parts = list(zip(self.values, self.targets, strict=True))
        is_weight = self.source.spec.section == "model"
        return GuardedTensor(self.source.spec.name, tuple(unique.values()), parts, is_weight)

    def look_up(self) -> bool:
        """Find the values of this save. Returns whether they are of the kind that was planned."""
        if not self.source.is_as_planned():
            return False
        self.value = self.source.holder[self.source.key]
        live = self.source.live()
        if not isinstance(live, Tensor):
            self.values = [torch.tensor(live, dtype=self.targets[0].dtype).reshape(1)]
            return True
        if self._local_shape not in (None, live.shape):
            return False
        self._local_shape = live.shape
        if len(self._pieces) == 1 and self._pieces[0].num_items == live.numel():
            # A view: if the live tensor gets other memory (`.data`, `.to()`), the view keeps this moment's.
            self.local, self.values = live, [live.detach()]
            self.targets = [self.targets[0].view(live.shape)]
            return True
        is_plain = live.is_contiguous()
        # Pieces of a tensor that is not contiguous are copied into order first, at each save and at once.
        self.local = live if is_plain else None
        self.is_at_once = self.source.is_volatile or not is_plain
        flat = live.detach().reshape(-1)
        self.values = [flat[piece.local : piece.local + piece.num_items] for piece in self._pieces]
        return True


class _Known:
    """Checks for thousands of tensors whether they are as at the last lookup, at each save in the training thread.

    It is stored by columns so that the loops run in C: 0.4 us for each tensor, a third of a loop in Python.
    """

    def __init__(self, copies: Sequence[_Copies]) -> None:
        self._holders = [each.source.holder for each in copies]
        self._keys = [each.source.key for each in copies]
        self._values = [each.value for each in copies]
        self._sharded = [each.value for each in copies if each.local is not each.value]
        self._shards = [each.local for each in copies if each.local is not each.value]
        # Thousands of pieces may be of one flat tensor.
        locals_ = {id(each.local): each.local for each in copies if each.local is not None}
        self._locals = list(locals_.values())
        self._pointers = list(map(Tensor.data_ptr, self._locals))
        # A tensor with one dimension has one memory order.
        self._matrices = [local for local in self._locals if local.dim() > 1]
        self._are_in_order = list(map(Tensor.is_contiguous, self._matrices))
        # Only buffers are resized in place, and these are few.
        self._now = [each.local for each in copies if each.is_at_once and each.local is not None]
        self._shapes_now = list(map(Tensor.size, self._now))

    def is_current(self) -> bool:
        """Return whether all are the same objects, in the same memory, in the same memory order."""
        values = map(operator.getitem, self._holders, self._keys)
        return (
            all(map(operator.is_, values, self._values))
            and all(map(operator.is_, map(_LOCAL_OF, self._sharded), self._shards))
            and list(map(Tensor.data_ptr, self._locals)) == self._pointers
            and list(map(Tensor.is_contiguous, self._matrices)) == self._are_in_order
            and list(map(Tensor.size, self._now)) == self._shapes_now
        )


class _Batch(NamedTuple):
    """The copies of one call. After it, the first `ready_bytes` of the memory are copied."""

    targets: list[Tensor]
    values: list[Tensor]
    ready_bytes: int


def _batches(copies: Sequence[_Copies], staging_bytes: int) -> list[_Batch]:
    """Order the copies by their place in memory, so that its beginning is written while its end is copied."""
    parts = sorted(
        ((piece.staging, target, value) for copy in copies for piece, target, value in copy.pieces()),
        key=operator.itemgetter(0),
    )
    batches: list[_Batch] = []
    first = size_bytes = 0
    for position, (_, target, _) in enumerate(parts, start=1):
        size_bytes += target.nbytes
        if position < len(parts) and position - first < _CALL_TENSORS and size_bytes < _CALL_BYTES:
            continue
        _, targets, values = zip(*parts[first:position], strict=True)
        ready_bytes = parts[position][0] if position < len(parts) else staging_bytes
        batches.append(_Batch(list(targets), list(values), ready_bytes))
        first, size_bytes = position, 0
    return batches


@dataclass(frozen=True)
class _HostCopy:
    """Copies batch by batch; ATen copies the tensors of a call without the GIL."""

    batches: Sequence[_Batch]

    def run(self, gate: Gate, sink: ReadySink) -> None:
        # Grad mode is a thread's own.
        with torch.no_grad():
            for position, batch in enumerate(self.batches, start=1):
                torch._foreach_copy_(batch.targets, batch.values)
                if position == len(self.batches):
                    gate.open()
                sink.report_ready(batch.ready_bytes)


@dataclass(frozen=True)
class _DeviceCopy:
    """Copies on a side stream. The next step may be enqueued as soon as the copies are."""

    stream: torch.cuda.Stream
    at_once: torch.cuda.Event
    batches: Sequence[_Batch]

    def run(self, gate: Gate, sink: ReadySink) -> None:
        events = [self.at_once]
        with torch.cuda.stream(self.stream), torch.no_grad():
            self.stream.wait_event(self.at_once)
            for batch in self.batches:
                torch._foreach_copy_(batch.targets, batch.values, non_blocking=True)
                events.append(self.stream.record_event())
        gate.open(events[-1])
        self.at_once.synchronize()
        for batch, event in zip(self.batches, events[1:], strict=True):
            event.synchronize()
            sink.report_ready(batch.ready_bytes)


@dataclass(frozen=True)
class _CompletedCopy:
    """Raises the failure of a copy that has run, if there is one."""

    failure: RuntimeError | None = None

    def run(self, gate: Gate, sink: ReadySink) -> None:
        if self.failure is not None:
            raise self.failure


class _Ignored:
    def open(self, event: torch.cuda.Event | None = None) -> None:
        pass

    def report_ready(self, num_bytes: int) -> None:
        pass


def copy_now(copy: PendingCopy) -> None:
    """Run a copy in this thread. Raises as `PendingCopy.run`."""
    ignored = _Ignored()
    copy.run(ignored, ignored)


def completed_copy(copy: PendingCopy) -> PendingCopy:
    """Run a copy in this thread; a failure is raised in the background thread, as part of the save."""
    try:
        copy_now(copy)
    except RuntimeError as error:
        return _CompletedCopy(error)
    return _CompletedCopy()


def no_copy() -> PendingCopy:
    """Return the copy of a save that is aborted before it has copied anything."""
    return _CompletedCopy()
