"""Counts the steps that one optimizer of several really makes."""

from __future__ import annotations

from typing import Any

import torch

from harness.checkpoint.sharding.find_shards import is_deepspeed_engine
from harness.checkpoint.sharding.local_shards import innermost
from harness.checkpoint.state.trainer_state import Watched


class StepCounter:
    """Counts the steps of a part's optimizer from now on.

    A step that a loss scaler skips is not counted: torch calls no hook for it, and DeepSpeed counts it as skipped.

    Effects: not collective; a hook on the optimizer's step until `close`; nothing on disk.

    Args:
        part: the model and the optimizer whose steps are counted.
    """

    def __init__(self, part: Watched) -> None:
        # DeepSpeed steps its optimizer once for each flat group, and counts whole steps in the engine.
        self._engine: Any = part.model if is_deepspeed_engine(part.model) else None
        self._num_seen = 0
        # Not traced into a compiled optimizer: it must run, each time.
        after_step = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._hook = innermost(part.optimizer).register_step_post_hook(after_step)
        self._num_taken = self._num_steps

    def _after_step(self, *_: Any) -> None:
        self._num_seen += 1

    @property
    def _num_steps(self) -> int:
        if self._engine is None:
            return self._num_seen
        return int(self._engine.global_steps - self._engine.skipped_steps)

    def take(self) -> int:
        """Steps since the last call."""
        num_new = self._num_steps - self._num_taken
        self._num_taken += num_new
        return num_new

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()
