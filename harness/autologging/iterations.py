"""Track one iteration over a prepared loader, and decide whether it trains.

An iteration trains if `accelerator.backward` is called within it, which happens only after the script has its first
batch. An iteration that is likely to train therefore begins as a training iteration, and is discarded if no backward
follows. An unlikely one is observed (`harness.data.pending_iteration`), and can become a training iteration later.

    OBSERVED  ->  LIKELY  ->  TRAINING
                    begins here if likely

    likely at its beginning      gradients are on, no training iteration is open, and either none has been seen yet, or
                                 an iteration over this data set that began in this mode (train or eval) has trained
    likely at the first forward  this data set was trained on, gradients are on, and the model is in the mode of the
                                 last backward: a script may call `model.train()` after the loader's first batch
    training                     backward was called
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.data.batch_size import batch_size
from harness.data.pending_iteration import PendingIteration
from harness.tracking.provenance import BatchDigest


class IterationState(Enum):
    """What is known of an iteration; see the module's docstring."""

    OBSERVED = "observed"
    LIKELY = "likely"
    TRAINING = "training"


class Iteration:
    """Tracks one iteration over a loader.

    Effects: not collective; main thread; never synchronises with the device; nothing on disk.

    Args:
        key: its data set, and the model's mode at its beginning.
        usual_size: samples of this rank in a full batch; None if not known.
        is_likely: whether it begins as a training iteration.
        is_part: whether it is a further iteration of the open epoch, whose position in the data is not tracked.

    Attributes:
        is_in_train_mode: the model's mode at its first backward.
        is_crossed: whether another iteration over the same loader ran within it, so that accelerate's
            `end_of_dataloader` does not refer to this one.
        hook: a hook on the model's next forward; None if there is none.
        pending: its beginning, if it did not begin as a training iteration; None otherwise.
        num_batches: batches that the script has received.
        num_unreported: batches that were completed and not reported to the logger.
        num_samples: samples of this rank in the current batch.
        digest: digest of its first batch; None if not needed.
    """

    def __init__(
        self, loader: Any, key: IterationKey, usual_size: int | None, *, is_likely: bool, is_part: bool = False
    ) -> None:
        self.loader = loader
        self.key = key
        self._usual_size = usual_size
        self.is_part = is_part
        self.state = IterationState.LIKELY if is_likely else IterationState.OBSERVED
        self.is_in_train_mode = self.is_recorded = self.is_crossed = self.has_stepped = False
        self.hook: Any = None
        self.pending: PendingIteration | None = None
        self.num_batches = self.num_unreported = self.num_samples = 0
        self.digest: BatchDigest | None = None
        self._loss: Tensor | None = None
        self._num_batches_of_loss = self._num_samples_of_loss = 0

    @property
    def is_training(self) -> bool:
        """Whether backward was called."""
        return self.state is IterationState.TRAINING

    @property
    def is_tracked(self) -> bool:
        """Whether its position in the data is the epoch's."""
        return self.state is not IterationState.OBSERVED and not self.is_part

    @property
    def is_empty(self) -> bool:
        """Whether the script has received no batch of it."""
        return self.num_batches == 0

    @property
    def has_unreported_work(self) -> bool:
        """Whether backward or a step followed the last reported batch."""
        return self._loss is not None or self.has_stepped

    def add_batch(self, batch: Any) -> None:
        """Count a batch as the script receives it."""
        self.num_samples = batch_size(batch, self._usual_size)
        self.num_batches += 1
        self._num_batches_of_loss += 1
        self._num_samples_of_loss += self.num_samples

    def add_loss(self, loss: Any) -> None:
        """Add the loss of a backward. Several losses of one batch are summed, as their gradients are."""
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Copy, since the script may add to the tensor in place.
            self._loss = loss.detach().clone() if self._loss is None else self._loss + loss.detach()

    def take_loss(self) -> tuple[Tensor, int] | None:
        """Return and reset the mean loss since the last call, and its number of samples, over one or more batches."""
        if self._loss is None:
            return None
        loss, num_batches = self._loss, max(1, self._num_batches_of_loss)
        taken = (loss if num_batches == 1 else loss / num_batches), self._num_samples_of_loss
        self._loss, self._num_batches_of_loss, self._num_samples_of_loss = None, 0, 0
        return taken

    def take_step(self) -> bool:
        """Return and reset whether an optimizer has stepped since the last call."""
        stepped, self.has_stepped = self.has_stepped, False
        return stepped

    def remove_hook(self) -> None:
        """Remove the hook on the model's next forward."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def may_continue_around(self, other_loader: Any) -> bool:
        """Whether it stays the current iteration while another loader is iterated over within it."""
        return (self.is_tracked or self.pending is not None) and not self.is_empty and other_loader is not self.loader

    def replaces(self, outer: Iteration) -> bool:
        """Whether this inner iteration trains, and the script only inspected the outer one's first batch."""
        return self.pending is not None and outer.num_batches == 1 and outer.has_unreported_work

    def take_over(self, outer: Iteration) -> None:
        """Move the loss, step and state of the iteration that this one replaces to this one."""
        self._loss, outer._loss = outer._loss, None
        self.has_stepped, outer.has_stepped = outer.has_stepped, False
        self.state = IterationState.TRAINING if outer.is_training else IterationState.LIKELY
        outer.state = IterationState.OBSERVED
        self.is_in_train_mode = outer.is_in_train_mode


class IterationKey(NamedTuple):
    """Identifies similar iterations.

    `number` is the index of the data set's loader among the prepared ones, or None if it was not prepared;
    `is_in_train_mode` is the model's mode at the beginning.
    """

    number: int | None
    is_in_train_mode: bool


class TrainingIterations:
    """Predicts which iterations train, from the earlier ones, alike on every rank.

    Attributes:
        keys: keys of the iterations that have trained.
        is_in_train_mode: the model's mode at the last backward; None before the first.
    """

    def __init__(self) -> None:
        self.keys: set[IterationKey] = set()
        self.is_in_train_mode: bool | None = None

    def has_loader(self, number: int | None) -> bool:
        """Whether a loader was trained on."""
        return any(key.number == number for key in self.keys)

    def is_likely(self, key: IterationKey) -> bool:
        """Whether an iteration is likely to train, at its beginning."""
        return torch.is_grad_enabled() and (not self.keys or key in self.keys)

    def is_likely_at_forward(self, key: IterationKey, *, is_in_train_mode: bool) -> bool:
        """Whether an observed iteration is likely to train, from the model's mode at its first forward."""
        return self.has_loader(key.number) and is_in_train_mode == self.is_in_train_mode

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"starts": sorted(map(list, self.keys), key=str), "is_in_train_mode": self.is_in_train_mode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.keys = {IterationKey(*each) for each in state["starts"]}
        self.is_in_train_mode = state["is_in_train_mode"]
