"""The copy of what a rank owns, taken while the next forward and backward run.

    main thread     save: look the tensors up, copy what may change at once, hand over
    copying thread  one call of ATen without the GIL (CPU), or copies on a side stream (CUDA)
    main thread     the next optimizer step waits, if it must, until the copy is done: the fence

The fence is a hook that torch calls before every optimizer's step, inside DeepSpeed's and accelerate's
too. Parameters and moments change in a step and nowhere else; what may change earlier is copied before
`begin` returns.
"""

from __future__ import annotations

import mmap
import operator
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.checkpoint.plan import Piece, Plan
from harness.checkpoint.shards.held import Held
from harness.checkpoint.shards.source import DTYPES, Source
from harness.errors import CheckpointError

Mode = Literal["overlapped", "blocking"]

# One call copies so many tensors: while it takes their list apart it holds the GIL.
_CALL_TENSORS = 256
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
        self._batches = _batches([copies for copies in self._copies if not copies.is_at_once])

    def begin(self) -> Callable[[], torch.cuda.Event | None]:
        """Copy at once what may change before the next optimizer step. `look_up` comes first.

        Returns:
            What copies the rest, for the copying thread: on the CPU it returns when all is copied; on CUDA
            it only enqueues, and returns the event after which the memory may be read.
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
            return lambda: _copy(batches, non_blocking=False)
        ready = torch.cuda.current_stream(self._device).record_event()

        def enqueue() -> torch.cuda.Event:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                _copy(batches, non_blocking=True)
                event: torch.cuda.Event = stream.record_event()
                return event

        return enqueue


class _Copies:
    """The copies of one source: where to, and, looked up at each save, from where.

    Attributes:
        targets: parts of the staging memory, with the type that is written.
        values: what is copied into them.
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
        is_plain = live.is_contiguous()
        # Elements that do not lie one after another are first copied into order, at each save and at once.
        self.local = live if is_plain else None
        self.is_at_once = self.source.at_once or not is_plain
        flat = live.detach().reshape(-1)
        self.values = [flat[piece.local : piece.local + piece.num_items] for piece in self._pieces]
        return True


class _Known:
    """Thousands of tensors, of which one question is asked at each save, on the trainer's thread.

    By columns, so that the loops are in C: 0.2 us for each tensor, where a loop in Python takes 0.6.
    """

    def __init__(self, copies: Sequence[_Copies]) -> None:
        self._holders = [each.source.holder for each in copies]
        self._keys = [each.source.key for each in copies]
        self._values = [each.value for each in copies]
        self._sharded = [each.value for each in copies if each.local is not each.value]
        self._shards = [each.local for each in copies if each.local is not each.value]
        self._locals = [each.local for each in copies if each.local is not None]
        self._pointers = list(map(Tensor.data_ptr, self._locals))
        self._shapes = list(map(Tensor.size, self._locals))

    def is_current(self) -> bool:
        """Whether all of them are the same objects, with the same memory and shape."""
        values = map(operator.getitem, self._holders, self._keys)
        return (
            all(map(operator.is_, values, self._values))
            and all(map(operator.is_, map(_LOCAL_OF, self._sharded), self._shards))
            and list(map(Tensor.data_ptr, self._locals)) == self._pointers
            and list(map(Tensor.size, self._locals)) == self._shapes
            and all(map(Tensor.is_contiguous, self._locals))
        )


def _batches(copies: Sequence[_Copies]) -> list[tuple[list[Tensor], list[Tensor]]]:
    pairs = [pair for copy in copies for pair in zip(copy.targets, copy.values, strict=True)]
    return [
        ([target for target, _ in part], [value for _, value in part])
        for part in (pairs[at : at + _CALL_TENSORS] for at in range(0, len(pairs), _CALL_TENSORS))
    ]


def _copy(batches: Sequence[tuple[list[Tensor], list[Tensor]]], *, non_blocking: bool) -> None:
    """All batches, each in one call: ATen copies tensor after tensor without the GIL."""
    # In a thread of its own, grad mode is on again.
    with torch.no_grad():
        for targets, values in batches:
            torch._foreach_copy_(targets, values, non_blocking=non_blocking)


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
