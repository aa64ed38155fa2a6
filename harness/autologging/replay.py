"""Replay completed epochs of a resumed run, since the script counts its epochs from the first.

Each replayed iteration yields one batch, so that the script's own results are defined. As in training, an iteration is
a training iteration if backward is called on its batch. Backward and optimizer steps have no effect, so the weights
stay as they were restored. All other state is restored again:

    buffers                              when the last replayed training iteration has ended: an evaluation follows
    random numbers                       when the first new epoch begins
    scheduler, and registered objects    both times
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.data import dataloaders
from harness.training.periodic_logger import PeriodicLogger


class Replay:
    """Replays completed epochs.

    Effects: not collective beyond the script's own iterations; main thread; allocates a copy of the buffers.

    Args:
        num_left: training iterations to replay.
        loaders: loaders whose `iteration` counts are restored from the checkpoint.

    Attributes:
        is_empty: whether the latest iteration has yielded no batch.
    """

    def __init__(self, logger: PeriodicLogger, model: nn.Module, num_left: int, loaders: Sequence[Any]) -> None:
        self._logger = logger
        self._ddp_modules = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
        self._buffers: list[tuple[Tensor, Tensor]] = [(each, each.detach().clone()) for each in model.buffers()]
        # The counts include the evaluation after the last training iteration, which runs again in full.
        self._iterations = {id(each): each.iteration for each in loaders if hasattr(each, "iteration")}
        self._lacks_epoch_end = bool(logger.events.loaders_done)
        # The loader of the latest iteration, until it is counted as replayed.
        self._loader: Any = None
        self._has_trained = False
        self.is_empty = False
        self.num_left = num_left

    def backward(self) -> None:
        """Record a call of backward in the latest iteration."""
        self._has_trained = True

    def take_trained(self) -> Any:
        """Return the loader of the latest iteration, once, if it has trained; None otherwise.

        If a script fetches all batches before the first backward, this is known only when the next iteration begins.
        """
        if not self._has_trained:
            return None
        loader, self._loader, self._has_trained = self._loader, None, False
        return loader

    def one_batch(self, loader: Any, original: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """Yield the first batch of a loader as its last one."""
        self._iterations.setdefault(id(loader), getattr(loader, "iteration", 0))
        self._loader, self._has_trained, self.is_empty = loader, False, True
        iterator = original(loader)
        try:
            for batch in iterator:
                self.is_empty = False
                loader.end_of_dataloader = True  # completes an accumulation
                with self._without_ddp_backward():
                    yield batch
                break
        finally:
            dataloaders.close_iteration(loader, iterator)

    @contextmanager
    def _without_ddp_backward(self) -> Iterator[None]:
        """Keep DDP from expecting a backward of these forwards.

        Otherwise it reduces gradients in the next backward, even if they are still being accumulated.
        """
        before = [
            (each, each.require_backward_grad_sync, each.require_forward_param_sync) for each in self._ddp_modules
        ]
        for each in self._ddp_modules:
            each.require_backward_grad_sync = False
        try:
            yield
        finally:
            for each, reduces, broadcasts in before:
                each.require_backward_grad_sync, each.require_forward_param_sync = reduces, broadcasts

    def end_training_iteration(self, loader: Any) -> bool:
        """End a replayed training iteration; returns True if it was the last one and its epoch has yet to end."""
        self.num_left -= 1
        if self.num_left:
            return False
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._logger.restore_again()
        if not self._lacks_epoch_end:
            return False
        self._logger.events.skip_loader(loader)
        self.end([loader])
        if hasattr(loader, "iteration"):
            loader.iteration += 1  # as accelerate does after the last batch
        self._logger.events.begin_epoch()
        # The script's scheduler may step before the epoch ends.
        self._logger.events.freeze_learning_rates()
        return True

    def end(self, loaders: Sequence[Any]) -> None:
        """Restore all state as the first new epoch begins."""
        for loader in loaders:
            if id(loader) in self._iterations:
                loader.iteration = self._iterations[id(loader)]
        self._logger.restore_again()
