"""The fence holds the next optimizer step back while a snapshot is copied; two policies decide whether that pays.

The fence is a hook that torch calls before every optimizer's step, also inside DeepSpeed and accelerate. Code that
writes weights outside a step does not pass the fence: `SourceGuard` detects such writes, and `Overlap` counts them.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from harness.checkpoint.save.source_guard import SourceGuard
from harness.errors import CheckpointError

Mode = Literal["overlapped", "blocking"]

_FENCE_TIMEOUT_S = 600.0
_NUM_TRIALS = 3


class Fence:
    """Holds optimizer steps back while a snapshot is being copied.

    Effects: not collective; one hook on every optimizer's step of this process until `remove`; a step
    blocks while a copy on the CPU runs, and on CUDA only until the copies are enqueued; nothing on disk.

    Attributes:
        unseen: identities of the optimizers given to `expect` before whose steps torch has not called the hook yet.
        num_steps: how often torch has called the hook, for any optimizer.
        waited_s: how long the training thread has waited for the last copy.
    """

    def __init__(self) -> None:
        self.unseen: set[int] = set()
        self._opened = threading.Event()
        self._opened.set()
        self._event: torch.cuda.Event | None = None
        self._guard: SourceGuard | None = None
        # Not traced into a compiled optimizer: it has to run before each step.
        before_step = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._hook = register_optimizer_step_pre_hook(before_step)
        self._passed = threading.Event()
        self._passed.set()
        self.num_steps = 0
        self.waited_s = 0.0

    @property
    def is_passed(self) -> bool:
        """Whether the training thread has waited for the copy of the last save."""
        return self._passed.is_set()

    def await_passed(self, timeout_s: float) -> None:
        """Block until the fence is passed, at most `timeout_s`. For the background thread."""
        self._passed.wait(timeout_s)

    def expect(self, optimizers: Sequence[Any]) -> None:
        """Set the optimizers whose steps have to be held back, each without its wrappers."""
        self.unseen = set(map(id, optimizers))

    def close(self, guard: SourceGuard) -> None:
        """Hold optimizer steps back until `open`. The next step checks the guard before it writes."""
        self._opened.clear()
        self._event = None
        self._guard = guard
        self.waited_s = 0.0
        self._passed.clear()

    def open(self, event: torch.cuda.Event | None = None) -> None:
        """Let steps run: the copy is done, or (CUDA) will be once `event` is. Any thread; the first call counts."""
        if not self._opened.is_set():
            self._event = event
            self._opened.set()

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self.num_steps += 1
        self.unseen.discard(id(optimizer))
        self.wait()

    def wait(self) -> None:
        """Block until everything is copied. Call it before the sources are written.

        Effects: not collective; main thread; blocks while a copy on the CPU runs; on CUDA the current stream waits.

        Raises:
            CheckpointError: if the copy is not done after 600 s.
        """
        if not self.is_passed:
            self._wait()
        event = self._event
        if event is not None:
            # Each step waits on its own stream, in its own thread, until the copy is done.
            torch.cuda.current_stream().wait_event(event)
            if event.query():  # type: ignore[no-untyped-call]
                self._event = None

    def _wait(self) -> None:
        begun_s = time.perf_counter()
        if not self._opened.wait(_FENCE_TIMEOUT_S):
            raise CheckpointError(
                f"the copy of a checkpoint into host memory was not done {_FENCE_TIMEOUT_S:.0f} s after the next step "
                "was due; look at this node's memory"
            )
        self.waited_s = time.perf_counter() - begun_s
        if self._guard is not None:
            # Before `is_passed` is set: its readers rely on the guard's result, and no step has written yet.
            self._guard.check()
            self._guard = None
        self._passed.set()

    def drop_guard(self) -> None:
        """Drop the guard, which keeps the staging memory alive."""
        self._guard = None

    def remove(self) -> None:
        """Remove the hook."""
        self._opened.set()
        self._hook.remove()


class ModeChoice:
    """Chooses whether this rank's copies overlap training, by the costs of the first saves.

    Overlapping loses where the step's own work is shorter than the copy, or memory is the limit: the next step then
    waits at the fence for longer than a copy takes while nothing else runs.

    Args:
        blocking_s: time of a copy while nothing else ran.
    """

    def __init__(self, blocking_s: float) -> None:
        self.blocking_s = blocking_s
        self.mode: Mode = "overlapped"
        self._waits_s: list[float] = []

    def add(self, waited_s: float) -> None:
        """Record how long the step after an overlapped save has waited."""
        if len(self._waits_s) < _NUM_TRIALS:
            self._waits_s.append(waited_s)
            if len(self._waits_s) == _NUM_TRIALS and statistics.median(self._waits_s) > self.blocking_s:
                self.mode = "blocking"


class Overlap:
    """Decides whether a save may be copied while training continues, by the writes seen around earlier saves.

    The first save of each kind (at an epoch's end, at a step) is copied before training continues, and its guard
    watches until the next step. If it has seen no write, later saves of that kind overlap. After any write no save
    overlaps. A program that writes its weights outside steps thus loses no checkpoint, unless it begins to do so
    later: then the guard of the overlapped save detects the write, and that save is not committed.

    Attributes:
        written: name of a tensor that was written outside a step; None if no write was seen.
    """

    def __init__(self) -> None:
        self.written: str | None = None
        self._safe_kinds: set[str] = set()
        self._observed: tuple[str, SourceGuard] | None = None

    def allows(self, kind: str) -> bool:
        """Return whether a save of that kind may overlap."""
        return self.written is None and kind in self._safe_kinds

    def observe(self, kind: str, guard: SourceGuard) -> None:
        """Record that a save of that kind was started; `read_guard` reads its guard."""
        self._observed = (kind, guard)

    def read_guard(self) -> str | None:
        """Read the guard once its fence is passed. Returns the name of the first tensor ever seen written, once."""
        if self._observed is None:
            return None
        (kind, guard), self._observed = self._observed, None
        self._safe_kinds.add(kind)
        return self.record_write(guard.written)

    def drop_guard(self) -> None:
        """Drop the observed guard, which keeps the staging memory alive and no longer sees writes."""
        self._observed = None

    def record_write(self, name: str | None) -> str | None:
        """Record that a tensor was written outside a step. Returns its name if it is the first."""
        if name is None or self.written is not None:
            return None
        self.written = name
        return name
