"""A pass over a loader that may turn out to train: what training's needs of its beginning, kept until that is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harness.data import dataloaders, rng_state
from harness.data.batch_sampler import WrappedSampler
from harness.data.resumable_loader import DataState


class PendingIteration:
    """Listens to a pass that begins, without a hand in it.

    Effects: not collective; main thread; nothing on disk.

    Args:
        loader: a loader that went through `accelerator.prepare`, before it is iterated over.
        sampler: what gives its batches, wrapped; None: that is not understood.
        device: this rank's.
        is_accumulating: whether gradients were being accumulated as the pass began.

    Attributes:
        loader: the loader.
        sampler: the sampler.
        random: random numbers before anything of the pass: those of the epoch before, where it trains.
        generators: of the loader's own generators, by `id`, the state then.
        data: random numbers as the sampler began, and before the latest fetch.
    """

    def __init__(
        self, loader: Any, sampler: WrappedSampler | None, device: torch.device, is_accumulating: bool
    ) -> None:
        self.loader = loader
        self.is_accumulating = is_accumulating
        self._device = device
        self._own = dataloaders.generators_of(loader)
        self.random = rng_state.capture(device)
        self.generators: dict[int, Tensor] = {id(each): each.get_state() for each in self._own}
        self.data = DataState(self.random, [list(self.generators.values())], None)
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self.sampler = sampler
        if self.sampler is not None:
            self.sampler.reset()
            self.sampler.at_start = self._start
            if self.sampler.fetches_here:
                self.sampler.before_fetch = self._keep

    def _start(self) -> None:
        self.data = DataState(rng_state.capture(self._device), [[each.get_state() for each in self._own]], None)

    def _keep(self) -> None:
        self.data.fetch = rng_state.capture(self._device)

    def keep_buffers(self, model: nn.Module) -> None:
        """A forward is about to move the model's buffers."""
        self._buffers = [(each, each.detach().clone()) for each in model.buffers()]

    @contextmanager
    def before_forward(self) -> Iterator[None]:
        """Within it the model's buffers are as they were when `keep_buffers` was called, if it was."""
        self._swap_buffers()
        try:
            yield
        finally:
            self._swap_buffers()

    def _swap_buffers(self) -> None:
        for buffer, other in self._buffers:
            # By their data: a backward that is still to come may not be told.
            now = buffer.data.clone()
            buffer.data.copy_(other)
            other.copy_(now)

    def leave(self) -> None:
        """The pass is over, and has not trained."""
        if self.sampler is not None:
            self.sampler.reset()
