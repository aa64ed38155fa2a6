"""What holds the next optimizer step back while a snapshot is copied, and whether that is worth it and safe.

The fence is a hook that torch calls before every optimizer's step, inside DeepSpeed's and accelerate's too. Code that
writes weights outside a step does not meet it: `SourceGuard` detects such writes, and `Overlap` decides by them.
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

    Effects: not collective; one hook on every optimizer's step of this process until `close`; a step
    blocks while a copy on the CPU runs, and never on CUDA beyond the enqueueing; nothing on disk.

    Attributes:
        unseen: identities of the optimizers that `expect` named and before whose step torch has not called the hook.
        num_steps: how often torch has called the hook, for any optimizer.
    """

    def __init__(self) -> None:
        self.unseen: set[int] = set()
        self._copied = threading.Event()
        self._copied.set()
        self._event: torch.cuda.Event | None = None
        self._guard: SourceGuard | None = None
        # Not traced into a compiled optimizer: it must run, each time.
        before_step = torch.compiler.disable(self._before_step)  # type: ignore[no-untyped-call]
        self._hook = register_optimizer_step_pre_hook(before_step)
        self._passed = threading.Event()
        self._passed.set()
        self.num_steps = 0
        self.waited_s = 0.0

    @property
    def is_passed(self) -> bool:
        """Whether the thread that trains has waited for the copy of the last save."""
        return self._passed.is_set()

    def await_pass(self, timeout_s: float) -> None:
        """Block until the fence is passed, at most so long: for the copying thread."""
        self._passed.wait(timeout_s)

    def expect(self, optimizers: Sequence[Any]) -> None:
        """Name the optimizers whose steps are to be held back, each as torch has it: inside all wrappers."""
        self.unseen = set(map(id, optimizers))

    def raise_(self, guard: SourceGuard) -> None:
        """From here on no optimizer steps until `lower`; the next step checks the guard before it writes."""
        self._copied.clear()
        self._event = None
        self._guard = guard
        self.waited_s = 0.0
        self._passed.clear()

    def lower(self, event: torch.cuda.Event | None = None) -> None:
        """The copy is done, or (CUDA) will be when `event` is: any thread. The first call counts."""
        if not self._copied.is_set():
            self._event = event
            self._copied.set()

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        self.num_steps += 1
        self.unseen.discard(id(optimizer))
        self.pass_()

    def pass_(self) -> None:
        """Block until everything is copied: what follows may write the sources.

        Effects: not collective; main thread; blocks while a copy on the CPU runs; on CUDA the current stream waits.

        Raises:
            CheckpointError: if the copy is not done after 600 s.
        """
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
        if self._guard is not None:
            # Before `is_passed`: whoever reads that has the guard's result, and no step has written yet.
            self._guard.check()
            self._guard = None
        self._passed.set()

    def disarm(self) -> None:
        """Drop the guard, and with it the staging memory that it compares with."""
        self._guard = None

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


class Overlap:
    """Whether a save may be copied while training continues, by what was seen of earlier saves.

    The first save of each kind (at an epoch's end, at a step) is copied before training continues, and its guard
    watches until the next step. If it has seen no write, later ones of that kind overlap; if any has, none does again.
    A program that writes its weights outside steps thus loses no checkpoint, unless it begins to do so later: then the
    guard of the overlapped save finds it, and that save is not committed.

    Attributes:
        written: name of a tensor that was written outside a step; None: none was seen.
    """

    def __init__(self) -> None:
        self.written: str | None = None
        self._safe_kinds: set[str] = set()
        self._observed: tuple[str, SourceGuard] | None = None

    def allows(self, kind: str) -> bool:
        """Whether a save of that kind may overlap."""
        return self.written is None and kind in self._safe_kinds

    def observe(self, kind: str, guard: SourceGuard) -> None:
        """A save of that kind has been begun; `learn` takes what its guard has seen."""
        self._observed = (kind, guard)

    def learn(self) -> str | None:
        """Once the fence of the save is passed: name of a tensor that was seen to be written, the first time."""
        if self._observed is None:
            return None
        (kind, guard), self._observed = self._observed, None
        self._safe_kinds.add(kind)
        return self.note_write(guard.written)

    def forget(self) -> None:
        """Drop what is observed: its guard no longer sees what is written, and keeps the staging memory."""
        self._observed = None

    def note_write(self, name: str | None) -> str | None:
        """A tensor was written outside a step; its name where it is the first."""
        if name is None or self.written is not None:
            return None
        self.written = name
        return name
