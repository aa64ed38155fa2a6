"""One iteration over a prepared loader, and whether it is training.

A pass that trains is one within which `accelerator.backward` is called. The first batch of it is out before that can
be seen, so what is likely to train begins as training does, and is forgotten again where nothing of it came. What is
not likely is listened to (`harness.data.pending_iteration`), and can become training's after all.

    likely   gradients are on, no training pass is open, and either none has been seen yet, or a pass over this data
             set that began with the model in this mode (train or eval) has trained
    or else  this data set was trained on, and at the first forward gradients are on and the model is in the mode of
             the last backward: a script may call `model.train()` behind the loader's first batch
    sure     backward was called
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.data.batch_size import batch_size
from harness.data.pending_iteration import PendingIteration
from harness.tracking.provenance import BatchDigest


class Iteration:
    """One iteration over a loader: what came of its batches.

    Effects: not collective; main thread; never synchronises with the device; nothing on disk.

    Args:
        loader: as the script has it.
        start: which data set it is over, and the model's mode, as it begins.
        usual_size: samples of this rank in a whole batch; None: not known.
        is_likely: whether it begins as training does.
        is_part: whether it is another pass of the epoch that is open.

    Attributes:
        is_training: whether backward was called.
        is_in_train_mode: the model's mode then.
        is_known: whether a batch of it is known to have been trained on.
        is_crossed: whether another pass over the same loader was within it: what accelerate says of its end is not its.
        hook: called at the model's next forward; None: nothing is.
        heard: what is known of its beginning, where it did not begin as training; None: nothing, or it did.
        num_out: batches that the script has had.
        num_seen: batches that are done and were not told to the logger.
        num_samples: of this rank, in the batch that is out.
        has_stepped: whether an optimizer has stepped since `take_step`.
        digest: of its first batch; None: it is not needed.
    """

    def __init__(
        self, loader: Any, start: IterationKey, usual_size: int | None, *, is_likely: bool, is_part: bool = False
    ) -> None:
        self.loader = loader
        self.start = start
        self._usual_size = usual_size
        self.is_likely = is_likely
        self.is_part = is_part
        self.is_training = self.is_in_train_mode = self.is_known = self.is_crossed = False
        self.hook: Any = None
        self.heard: PendingIteration | None = None
        self.num_out = 0
        self.num_seen = 0
        self.num_samples = 0
        self.has_stepped = False
        self.digest: BatchDigest | None = None
        self._loss: Tensor | None = None
        self._batches_of_loss = 0
        self._samples_of_loss = 0

    def batch_is_out(self, batch: Any) -> None:
        """The script has a batch."""
        self.num_samples = batch_size(batch, self._usual_size)
        self.num_out += 1
        self._batches_of_loss += 1
        self._samples_of_loss += self.num_samples

    def backward(self, loss: Any) -> None:
        """Backward is called with a loss."""
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # A copy: the script may go on to sum up in it. Of several for one batch the sum is what is trained on.
            self._loss = loss.detach().clone() if self._loss is None else self._loss + loss.detach()

    @property
    def is_empty(self) -> bool:
        """Whether the script had no batch of it."""
        return self.num_out == 0

    @property
    def has_news(self) -> bool:
        """Whether backward or a step came since the last batch was done."""
        return self._loss is not None or self.has_stepped

    def may_lead(self, other: Any) -> bool:
        """Whether it goes on to be the pass that is counted while another loader is iterated over."""
        return (self.is_likely or self.heard is not None) and self.num_out > 0 and other is not self.loader

    def forget_hook(self) -> None:
        """The model's next forward says nothing of this pass."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def take_step(self) -> bool:
        """Whether an optimizer has stepped since this was asked last."""
        stepped, self.has_stepped = self.has_stepped, False
        return stepped

    def leads_over(self, running: Iteration) -> bool:
        """Whether this one, within another, is what is trained on: it goes on behind a backward, the other does not.

        Somebody has had a look into the other's first batch, then.
        """
        return self.heard is not None and running.num_out == 1 and running.has_news

    def take_over(self, other: Iteration) -> None:
        """What came of the other pass's batch came of this one's."""
        self._loss, other._loss = other._loss, None
        self.has_stepped, other.has_stepped = other.has_stepped, False
        self.is_likely, other.is_likely = True, False
        self.is_training, other.is_training = other.is_training, False
        self.is_in_train_mode = other.is_in_train_mode

    def take_loss(self) -> tuple[Tensor, int] | None:
        """The loss of a batch, and how many samples it is over; a script may fetch several before backward."""
        if self._loss is None:
            return None
        loss, num_batches = self._loss, max(1, self._batches_of_loss)
        taken = (loss if num_batches == 1 else loss / num_batches), self._samples_of_loss
        self._loss, self._batches_of_loss, self._samples_of_loss = None, 0, 0
        return taken


class IterationKey(NamedTuple):
    """How a pass begins.

    Args:
        number: of the data set's loader among the prepared ones; None: it is none of them.
        is_in_train_mode: the model's mode.
    """

    number: int | None
    is_in_train_mode: bool


class TrainedOn:
    """Which passes train, by those before: the same on every rank.

    Attributes:
        starts: how those that trained have begun.
        is_in_train_mode: the model's mode when backward was called last; None: it never was.
    """

    def __init__(self) -> None:
        self.starts: set[IterationKey] = set()
        self.is_in_train_mode: bool | None = None

    @property
    def numbers(self) -> set[int | None]:
        """The loaders that were trained on."""
        return {start.number for start in self.starts}

    def makes_likely(self, start: IterationKey) -> bool:
        """Whether a pass that begins like this is likely to train."""
        return torch.is_grad_enabled() and (not self.starts or start in self.starts)

    def makes_likely_now(self, start: IterationKey, *, is_in_train_mode: bool) -> bool:
        """Whether one that began otherwise is likely to train, by the model's mode at its first forward."""
        return start.number in self.numbers and is_in_train_mode == self.is_in_train_mode

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {"starts": sorted(map(list, self.starts), key=str), "is_in_train_mode": self.is_in_train_mode}

    def put_back(self, state: Mapping[str, Any]) -> None:
        """What `state` gave."""
        self.starts = {IterationKey(*each) for each in state["starts"]}
        self.is_in_train_mode = state["is_in_train_mode"]
