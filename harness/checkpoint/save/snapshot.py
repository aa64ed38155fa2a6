"""The copy of what a rank owns, taken while the next forward and backward run.

    main thread     save: look the tensors up, copy what may change at once, arm the guard, hand over
    copying thread  one call of ATen without the GIL (CPU), or copies on a side stream (CUDA)
    main thread     the next optimizer step waits, if it must, until the copy is done: `fence`

What may change before the next step (buffers, frozen weights, plain numbers) is copied before `begin` returns. The
rest should change in a step and nowhere else; `source_guard` detects user code that writes it elsewhere.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.checkpoint.format.tensor_shard import DTYPES, TensorShard
from harness.checkpoint.save.plan import Piece, Plan
from harness.checkpoint.save.source_guard import GuardedTensor, SourceGuard
from harness.checkpoint.save.staging import StagingMemory
from harness.checkpoint.sharding.local_shards import LocalShards

# Says that the next step may come, on CUDA after an event; and how much of the memory is copied.
Lower = Callable[["torch.cuda.Event | None"], None]
Ready = Callable[[int], None]
CopyRest = Callable[[Lower, Ready], None]

# One call copies so many tensors: while it takes their list apart it holds the GIL.
_CALL_TENSORS = 256
# And no more than this, so that the disk has something to do soon.
_CALL_BYTES = 16 << 20
_LOCAL_OF = operator.attrgetter("_local_tensor")


class Snapshot:
    """Copies the pieces of a plan into staging memory.

    Effects: not collective; main thread, but for what `begin` returns; `begin` blocks for what is copied at once;
    nothing on disk.

    Args:
        held: what this rank holds.
        plan: what of it to copy, and where to.
        staging: the memory.
        device: of the model.

    Attributes:
        guard: of what is copied after `begin` has returned; armed by it.
    """

    guard: SourceGuard

    def __init__(self, held: LocalShards, plan: Plan, staging: StagingMemory, device: torch.device) -> None:
        self._held = held
        self._device = device
        self._staging_bytes = staging.size_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        by_source: dict[int, list[Piece]] = {}
        for piece in plan.pieces:
            by_source.setdefault(piece.source, []).append(piece)
        # Nobody copies anything of these, and each rank sees by itself when they come to hold something.
        self._empty = [source for source in held.tensors if source.spec.num_items == 0]
        self._copies = [_Copies(held.tensors[index], pieces, staging) for index, pieces in by_source.items()]
        self._sort()

    def look_up(self) -> bool:
        """Find everything where it lies now; whether all of it still has the shape that was planned."""
        if not self._held.is_current:
            return False
        try:
            return self._look_up()
        except (KeyError, IndexError, AttributeError):
            return False  # what was looked for is no longer there

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
        """Divide the copies: those that are found again by what they were, and those that are looked up anew."""
        self._known = _Known([copies for copies in self._copies if copies.local is not None])
        self._unknown = [copies for copies in self._copies if copies.local is None]
        self._at_once = [copies for copies in self._copies if copies.is_at_once]
        later = [copies for copies in self._copies if not copies.is_at_once]
        self._batches = _batches(later, self._staging_bytes)
        self.guard = SourceGuard([copies.guarded() for copies in later])

    def begin(self) -> CopyRest:
        """Copy at once what may change before the next optimizer step. `look_up` comes first.

        Returns:
            What copies the rest, for the copying thread. It blocks until the memory holds everything.
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
            return functools.partial(_copy, batches)
        is_volatile = torch.cuda.current_stream(self._device).record_event()
        return functools.partial(_copy_on, stream, is_volatile, batches)


class _Copies:
    """The copies of one source: where to, and, looked up at each save, from where.

    Attributes:
        targets: parts of the staging memory, with the type that is written.
        values: what is copied into them: other tensors on the same memory, which they keep.
        value: what the holder holds.
        local: this rank's tensor of it, or None where the values must be made anew at each save.
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
        """Each piece with its target and its value."""
        return zip(self._pieces, self.targets, self.values, strict=True)

    def guarded(self) -> GuardedTensor:
        """What the guard compares."""
        # A DTensor's own operations advance its own counter, those on its local tensor that one's.
        counters = [each for each in (self.value, self.local) if isinstance(each, Tensor)]
        unique = {id(counter): counter for counter in counters}
        parts = list(zip(self.values, self.targets, strict=True))
        is_weight = self.source.spec.section == "model"
        return GuardedTensor(self.source.spec.name, tuple(unique.values()), parts, is_weight)

    def look_up(self) -> bool:
        """Find the values as they are now; whether they are of the kind that was planned."""
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
            # Not the live tensor itself: if it gets other memory (`.data`, `.to()`), this still is of the moment.
            self.local, self.values = live, [live.detach()]
            self.targets = [self.targets[0].view(live.shape)]
            return True
        is_plain = live.is_contiguous()
        # Parts of what does not lie in order are first put in order, at each save and at once.
        self.local = live if is_plain else None
        self.is_at_once = self.source.is_volatile or not is_plain
        flat = live.detach().reshape(-1)
        self.values = [flat[piece.local : piece.local + piece.num_items] for piece in self._pieces]
        return True


class _Known:
    """Thousands of tensors, of which one question is asked at each save, on the trainer's thread.

    By columns, so that the loops are in C: 0.4 us for each tensor, where a loop in Python takes three times
    as long.
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
        # What has one dimension cannot be turned where it is.
        self._matrices = [local for local in self._locals if local.dim() > 1]
        self._are_in_order = list(map(Tensor.is_contiguous, self._matrices))
        # What is resized where it is, is a buffer; and these are few.
        self._now = [each.local for each in copies if each.is_at_once and each.local is not None]
        self._shapes_now = list(map(Tensor.size, self._now))

    def is_current(self) -> bool:
        """Whether all of them are the same objects, in the same memory, in the same order there."""
        values = map(operator.getitem, self._holders, self._keys)
        return (
            all(map(operator.is_, values, self._values))
            and all(map(operator.is_, map(_LOCAL_OF, self._sharded), self._shards))
            and list(map(Tensor.data_ptr, self._locals)) == self._pointers
            and list(map(Tensor.is_contiguous, self._matrices)) == self._are_in_order
            and list(map(Tensor.size, self._now)) == self._shapes_now
        )


class _Batch(NamedTuple):
    """One call's copies; after it, the first `ready_bytes` of the memory are copied."""

    targets: list[Tensor]
    values: list[Tensor]
    ready_bytes: int


def _batches(copies: Sequence[_Copies], staging_bytes: int) -> list[_Batch]:
    """In the order of the memory, so that its beginning can be written while its end is copied."""
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


def _copy(batches: Sequence[_Batch], lower: Lower, ready: Ready) -> None:
    """All batches, each in one call: ATen copies tensor after tensor without the GIL."""
    # In a thread of its own, grad mode is on again.
    with torch.no_grad():
        for position, batch in enumerate(batches, start=1):
            torch._foreach_copy_(batch.targets, batch.values)
            if position == len(batches):
                lower(None)
            ready(batch.ready_bytes)


def _copy_on(
    stream: torch.cuda.Stream, is_volatile: torch.cuda.Event, batches: Sequence[_Batch], lower: Lower, ready: Ready
) -> None:
    """The same on a stream; the next step may be enqueued as soon as the copies are."""
    events = [is_volatile]
    with torch.cuda.stream(stream), torch.no_grad():
        stream.wait_event(is_volatile)
        for batch in batches:
            torch._foreach_copy_(batch.targets, batch.values, non_blocking=True)
            events.append(stream.record_event())
    lower(events[-1])
    is_volatile.synchronize()
    for batch, event in zip(batches, events[1:], strict=True):
        event.synchronize()
        ready(batch.ready_bytes)


def copy_here(copy_rest: CopyRest) -> None:
    """Copy the rest in this thread, with nobody to wait for it.

    Raises:
        RuntimeError: if a copy fails, on this rank alone.
    """
    copy_rest(_no_matter, _no_matter)


def copied(copy_rest: CopyRest) -> CopyRest:
    """The same; what remains for the copying thread is to fail if this did."""
    failure: list[RuntimeError] = []
    try:
        copy_here(copy_rest)
    except RuntimeError as error:
        failure.append(error)

    def remains(lower: Lower, ready: Ready) -> None:
        if failure:
            raise failure[0]

    return remains


def copy_nothing(lower: Lower, ready: Ready) -> None:
    """What there is to copy where a save is called off."""


def _no_matter(_: object) -> None:
    """Nobody waits for it."""
