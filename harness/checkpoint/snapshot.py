"""The copy of what a rank owns, taken while the next forward and backward run.

    main thread     save: look the tensors up, copy what may change at once, hand over
    copying thread  one call of ATen without the GIL (CPU), or copies on a side stream (CUDA)
    main thread     the next optimizer step waits, if it must, until the copy is done: the fence

The fence is a hook that torch calls before every optimizer's step, inside DeepSpeed's and accelerate's
too. Parameters and moments change in a step and nowhere else; what may change earlier is copied before
`begin` returns.
"""

from __future__ import annotations

import functools
import mmap
import operator
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.checkpoint.plan import Piece, Plan
from harness.checkpoint.shards.held import Held
from harness.checkpoint.shards.source import DTYPES, Source
from harness.errors import CheckpointError

Mode = Literal["overlapped", "blocking"]
# Says that the next step may come, on CUDA after an event; and how much of the memory is copied.
Lower = Callable[["torch.cuda.Event | None"], None]
Ready = Callable[[int], None]
CopyRest = Callable[[Lower, Ready], None]

# One call copies so many tensors: while it takes their list apart it holds the GIL.
_CALL_TENSORS = 256
# And no more than this, so that the disk has something to do soon.
_CALL_BYTES = 16 << 20
_LOCAL_OF = operator.attrgetter("_local_tensor")
_FENCE_TIMEOUT_S = 600.0
_NUM_TRIALS = 3


class StagingMemory:
    """Host memory for what one rank owns, that other processes can map by its file descriptor.

    Effects: not collective; blocks while the pages are made; leaves nothing on disk.

    Args:
        size_bytes: at least one page is taken.
        pinned: page-lock it, for copies from a CUDA device.
    """

    def __init__(self, size_bytes: int, *, pinned: bool) -> None:
        self.size_bytes = max(size_bytes, mmap.PAGESIZE)
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, self.size_bytes)
        self._map = mmap.mmap(self.descriptor, self.size_bytes)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        # Every page is made now: the first save shall not pay for it.
        self.bytes.zero_()
        self._pinned = pinned
        if pinned:
            _cudart("cudaHostRegister", self.bytes.data_ptr(), self.size_bytes, 0)

    def close(self) -> None:
        """Give the memory back. Whoever has mapped it keeps it."""
        if self._pinned:
            _cudart("cudaHostUnregister", self.bytes.data_ptr())
            self._pinned = False
        os.close(self.descriptor)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("harness-staging", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # elsewhere than on Linux
        return os.dup(file.fileno())


def _cudart(function: str, *arguments: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(getattr(runtime, function)(*arguments))
    if code != 0:
        raise CheckpointError(f"{function}: host memory for checkpoints cannot be page-locked (CUDA error {code})")


class Snapshot:
    """Copies the pieces of a plan into staging memory.

    Effects: not collective; `begin` and the fence run in the main thread (the fence in whichever thread
    steps an optimizer); `begin` blocks for what is copied at once; nothing on disk.

    Args:
        held: what this rank holds.
        plan: what of it to copy, and where to.
        staging: the memory.
        device: of the model.
    """

    def __init__(self, held: Held, plan: Plan, staging: StagingMemory, device: torch.device) -> None:
        self._held = held
        self._device = device
        self._staging_bytes = staging.size_bytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        by_source: dict[int, list[Piece]] = {}
        for piece in plan.pieces:
            by_source.setdefault(piece.source, []).append(piece)
        # Nobody copies anything of these, and each rank sees by itself when they come to hold something.
        self._empty = [source for source in held.sources if source.spec.num_items == 0]
        self._copies = [_Copies(held.sources[index], pieces, staging) for index, pieces in by_source.items()]
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
        self._batches = _batches([copies for copies in self._copies if not copies.is_at_once], self._staging_bytes)

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
        batches, stream = self._batches, self._stream
        if stream is None:
            return functools.partial(_copy, batches)
        at_once = torch.cuda.current_stream(self._device).record_event()
        return functools.partial(_copy_on, stream, at_once, batches)


class _Copies:
    """The copies of one source: where to, and, looked up at each save, from where.

    Attributes:
        targets: parts of the staging memory, with the type that is written.
        values: what is copied into them: other tensors on the same memory, which they keep.
        value: what the holder holds.
        local: this rank's tensor of it, or None where the values must be made anew at each save.
        is_at_once: whether they are copied before `begin` returns.
    """

    def __init__(self, source: Source, pieces: Sequence[Piece], staging: StagingMemory) -> None:
        self.source = source
        self._pieces = pieces
        dtype, item = DTYPES[source.spec.dtype], source.spec.item_bytes
        self.targets = [
            staging.bytes[piece.staging : piece.staging + piece.num_items * item].view(dtype) for piece in pieces
        ]
        self.values: list[Tensor] = []
        self.value: Any = None
        self.local: Tensor | None = None
        self.is_at_once = source.at_once
        self._local_shape: torch.Size | None = None
        self.look_up()

    def pieces(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Each piece with its target and its value."""
        return zip(self._pieces, self.targets, self.values, strict=True)

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
        self.is_at_once = self.source.at_once or not is_plain
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
    stream: torch.cuda.Stream, at_once: torch.cuda.Event, batches: Sequence[_Batch], lower: Lower, ready: Ready
) -> None:
    """The same on a stream; the next step may be enqueued as soon as the copies are."""
    events = [at_once]
    with torch.cuda.stream(stream), torch.no_grad():
        stream.wait_event(at_once)
        for batch in batches:
            torch._foreach_copy_(batch.targets, batch.values, non_blocking=True)
            events.append(stream.record_event())
    lower(events[-1])
    at_once.synchronize()
    for batch, event in zip(batches, events[1:], strict=True):
        event.synchronize()
        ready(batch.ready_bytes)


class Fence:
    """Holds optimizer steps back while a snapshot is being copied.

    Effects: not collective; one hook on every optimizer's step of this process until `close`; a step
    blocks while a copy on the CPU runs, and never on CUDA beyond the enqueueing; nothing on disk.

    Attributes:
        watched: the optimizer whose steps `num_steps` counts; None: every optimizer's.
        num_steps: how often torch has called the hook.
    """

    def __init__(self) -> None:
        self.watched: Any = None
        self._copied = threading.Event()
        self._copied.set()
        self._event: torch.cuda.Event | None = None
        # Not traced into a compiled optimizer: it must run, each time.
        before_step = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._hook = register_optimizer_step_pre_hook(before_step)
        self.is_passed = True
        self.num_steps = 0
        self.waited_s = 0.0

    def raise_(self) -> None:
        """From here on no optimizer steps until `lower`."""
        self._copied.clear()
        self._event = None
        self.waited_s = 0.0
        self.is_passed = False

    def lower(self, event: torch.cuda.Event | None = None) -> None:
        """The copy is done, or (CUDA) will be when `event` is: any thread. The first call counts."""
        if not self._copied.is_set():
            self._event = event
            self._copied.set()

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self.num_steps += self.watched is None or optimizer is self.watched
        if not self.is_passed:
            self._wait()
        event = self._event
        if event is not None:
            # Each step on its own stream, in its own thread: all of them wait until the copy is over.
            torch.cuda.current_stream().wait_event(event)
            if event.query():  # type: ignore[no-untyped-call]
                self._event = None

    def _wait(self) -> None:
        begun_s = time.perf_counter()
        if not self._copied.wait(_FENCE_TIMEOUT_S):
            raise CheckpointError(
                f"the copy of a checkpoint into host memory was not done {_FENCE_TIMEOUT_S:.0f} s after the next step "
                "was due; look at this node's memory"
            )
        self.waited_s = time.perf_counter() - begun_s
        self.is_passed = True

    def close(self) -> None:
        """Take the hook away."""
        self._copied.set()
        self._hook.remove()


class ModeChoice:
    """Overlapped or blocking, by what the first saves have cost this rank.

    Overlapping can lose: where the step's own work is shorter than the copy, or memory is the limit, the
    next step waits at the fence for longer than a copy takes while nothing else runs.

    Args:
        blocking_s: what a copy took while nothing else ran.
    """

    def __init__(self, blocking_s: float) -> None:
        self.blocking_s = blocking_s
        self.mode: Mode = "overlapped"
        self._waits_s: list[float] = []

    def add(self, waited_s: float) -> None:
        """How long the step after an overlapped save has waited."""
        if len(self._waits_s) < _NUM_TRIALS:
            self._waits_s.append(waited_s)
            if len(self._waits_s) == _NUM_TRIALS and statistics.median(self._waits_s) > self.blocking_s:
                self.mode = "blocking"
