"""Record an iteration over a loader until it is known whether it trains.

Autologging detects only at the first `backward` that a loop trains. Until then this module records the states before
the iteration, which a checkpoint of the previous epoch and a resume within this one need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.data import dataloaders, rng_state
from harness.data.batch_sampler import IterationPlan, WrappedSampler
from harness.data.resumable_loader import DataState


class PendingIteration:
    """Records the start and the fetches of an iteration, without changing it.

    Effects: not collective; main thread; nothing on disk.

    Args:
        loader: a loader from `accelerator.prepare`, before it is iterated over.
        sampler: its wrapped batch sampler; None if the loader's kind is not supported.
        is_accumulating: whether the iteration starts within a gradient accumulation.

    Attributes:
        rng_states: random states before the iteration.
        generator_states: states of the loader's generators before the iteration, by `id`.
        data: random states at the start of the sampler, and before the latest fetch.
    """

    def __init__(
        self, loader: Any, sampler: WrappedSampler | None, device: torch.device, is_accumulating: bool
    ) -> None:
        self.loader = loader
        self.is_accumulating = is_accumulating
        self._device = device
        self._generators = dataloaders.generators_of(loader)
        self.rng_states = rng_state.capture(device)
        self.generator_states: dict[int, Tensor] = {id(each): each.get_state() for each in self._generators}
        self.data = DataState(self.rng_states, [list(self.generator_states.values())], None)
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.sampler = sampler
        if sampler is not None:
            sampler.reset()
            sampler.plan = IterationPlan(listener=self, reports_fetches=sampler.loads_in_process)

    def on_iteration_start(self) -> None:
        """Record the random states at the start of the sampler."""
        states = [each.get_state() for each in self._generators]
        self.data = DataState(rng_state.capture(self._device), [states], None)

    def on_fetch(self) -> None:
        """Record the random states before a fetch."""
        self.data.fetch = rng_state.capture(self._device)

    def save_buffers(self, model: nn.Module) -> None:
        """Copy the model's buffers, before a forward changes them."""
        self._buffers = [(each, each.detach().clone()) for each in model.buffers()]

    @contextmanager
    def saved_buffers(self) -> Iterator[None]:
        """Restore the buffers that `save_buffers` copied, if any, within the context."""
        self._swap_buffers()
        try:
            yield
        finally:
            self._swap_buffers()

    def _swap_buffers(self) -> None:
        for buffer, other in self._buffers:
            # Writing through `data` keeps the version counter, because a backward may still need the buffer.
            now = buffer.data.clone()
            buffer.data.copy_(other)
            other.copy_(now)

    def discard(self) -> None:
        """Stop recording an iteration that ended without training."""
        if self.sampler is not None:
            self.sampler.reset()
