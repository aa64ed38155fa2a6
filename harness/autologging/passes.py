"""One iteration over a prepared loader, and whether it is training.

A pass that trains is one within which `accelerator.backward` is called. The first batch of it is out before that can
be seen, so what is likely to train begins as training does, and is forgotten again where nothing of it came.

    likely   gradients are on, no training pass is open, and either none has been seen yet, or this data set was
             trained on with the model in this mode (train or eval)
    sure     backward was called
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness import data


class Pass:
    """One iteration over a loader: what came of its batches.

    Effects: not collective; main thread; never synchronises with the device; nothing on disk.

    Args:
        loader: as the script has it.
        is_likely: whether it began as training does.

    Attributes:
        is_training: whether backward was called.
        num_seen: batches that are done and were not told to the logger.
        num_samples: of this rank, in the batch that is out.
        has_stepped: whether an optimizer has stepped since `take_step`.
    """

    def __init__(self, loader: Any, *, is_likely: bool) -> None:
        self.loader = loader
        self.is_likely = is_likely
        self.is_training = False
        self.num_seen = 0
        self.num_samples = 0
        self.has_stepped = False
        self._loss: Tensor | None = None
        self._batches_of_loss = 0
        self._samples_of_loss = 0

    def batch_is_out(self, batch: Any) -> None:
        """The script has a batch."""
        self.num_samples = data.batch_size(batch)
        self._batches_of_loss += 1
        self._samples_of_loss += self.num_samples

    def backward(self, loss: Any) -> None:
        """Backward is called with a loss."""
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Of several for one batch the sum is what is trained on.
            self._loss = loss if self._loss is None else self._loss.detach() + loss.detach()

    @property
    def has_news(self) -> bool:
        """Whether backward or a step came since the last batch was done."""
        return self._loss is not None or self.has_stepped

    def take_step(self) -> bool:
        """Whether an optimizer has stepped since this was asked last."""
        stepped, self.has_stepped = self.has_stepped, False
        return stepped

    def take_loss(self) -> tuple[Tensor, int] | None:
        """The loss of a batch, and how many samples it is over; a script may fetch several before backward."""
        if self._loss is None:
            return None
        loss, num_batches = self._loss, max(1, self._batches_of_loss)
        taken = (loss if num_batches == 1 else loss / num_batches), self._samples_of_loss
        self._loss, self._batches_of_loss, self._samples_of_loss = None, 0, 0
        return taken


class TrainedOn:
    """Which loaders were trained on, and with the model in which mode: the same on every rank.

    Attributes:
        loaders: their numbers among the prepared ones.
        is_in_train_mode: the model's mode when backward was called last; None: it never was.
    """

    def __init__(self) -> None:
        self.loaders: set[int] = set()
        self.is_in_train_mode: bool | None = None

    def saw(self, index: int | None, *, is_in_train_mode: bool) -> None:
        """Backward was called on a batch of a loader."""
        self.is_in_train_mode = is_in_train_mode
        if index is not None:
            self.loaders.add(index)

    def makes_likely(self, index: int | None, *, is_in_train_mode: bool) -> bool:
        """Whether a pass that begins is likely to train, by those before it."""
        if not torch.is_grad_enabled():
            return False
        if self.is_in_train_mode is None:
            return True
        return index in self.loaders and is_in_train_mode == self.is_in_train_mode
