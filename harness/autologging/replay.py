"""Epochs that are done already go by again, because the script counts them itself, and nothing comes of them.

Each pass gives one batch, so that what a script makes of a pass's results has something to work with. One on which
backward is called was a training pass, as it was the first time. Backward and the optimizers' steps are left out, so
the weights stay those that were put back; what else moves is put back again:

    buffers         when the last of the training passes is over: what comes then is evaluated on them
    random numbers  when the first pass begins that is not done
    scheduler, what is registered   at both
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
    """Passes that are done.

    Effects: not collective beyond the script's own passes; main thread; memory for a copy of the buffers.

    Args:
        logger: whose run goes on.
        model: as it was put back.
        num_left: training passes that are done.
        loaders: with the numbers of their passes as the checkpoint has them.

    Attributes:
        is_empty: the latest pass has given no batch.
    """

    def __init__(self, logger: PeriodicLogger, model: nn.Module, num_left: int, loaders: Sequence[Any]) -> None:
        self._logger = logger
        self._reducing = [each for each in model.modules() if isinstance(each, DistributedDataParallel)]
        self._buffers: list[tuple[Tensor, Tensor]] = [(each, each.detach().clone()) for each in model.buffers()]
        # The evaluation behind the last training pass runs whole, and is in the checkpoint's numbers already.
        self._iterations = {id(each): each.iteration for each in loaders if hasattr(each, "iteration")}
        self._is_epoch_cut = bool(logger.events.loaders_done)
        # The latest pass, until it is known that it is one of those that are done.
        self._loader: Any = None
        self._has_trained = False
        self.is_empty = False
        self.num_left = num_left

    def backward(self) -> None:
        """Backward was called on what the latest pass has given, or would have been."""
        self._has_trained = True

    def take_trained(self) -> Any:
        """The loader of the latest pass, if it is over and has trained, once; None: it has not, until now.

        A script may fetch all its batches before the first backward: then it is known when the next pass begins.
        """
        if not self._has_trained:
            return None
        loader, self._loader, self._has_trained = self._loader, None, False
        return loader

    def one_batch(self, loader: Any, original: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        """The first batch of a loader, as its last one."""
        self._iterations.setdefault(id(loader), getattr(loader, "iteration", 0))
        self._loader, self._has_trained, self.is_empty = loader, False, True
        iterator = original(loader)
        try:
            for batch in iterator:
                self.is_empty = False
                loader.end_of_dataloader = True  # or an accumulation would stay open
                with self._no_backward_follows():
                    yield batch
                break
        finally:
            dataloaders.close_iteration(loader, iterator)

    @contextmanager
    def _no_backward_follows(self) -> Iterator[None]:
        """Have DDP not wait for the backward of these forwards.

        It would take the next one for it, and reduce gradients there that are still to be accumulated.
        """
        before = [(each, each.require_backward_grad_sync, each.require_forward_param_sync) for each in self._reducing]
        for each in self._reducing:
            each.require_backward_grad_sync = False
        try:
            yield
        finally:
            for each, reduces, broadcasts in before:
                each.require_backward_grad_sync, each.require_forward_param_sync = reduces, broadcasts

    def pass_done(self, loader: Any) -> bool:
        """A training pass is over; whether it is the last one, of an epoch whose end is still to come."""
        self.num_left -= 1
        if self.num_left:
            return False
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        self._logger.restore_again()
        if not self._is_epoch_cut:
            return False
        self._logger.events.skip_loader(loader)
        self.goes_on([loader])
        if hasattr(loader, "iteration"):
            loader.iteration += 1  # as accelerate does behind the last batch
        self._logger.events.begin_epoch()
        # As at the end of a pass: the script's scheduler may step before the epoch ends.
        self._logger.events.freeze_learning_rates()
        return True

    def goes_on(self, loaders: Sequence[Any]) -> None:
        """The first pass begins that is not done."""
        for loader in loaders:
            if id(loader) in self._iterations:
                loader.iteration = self._iterations[id(loader)]
        self._logger.restore_again()
