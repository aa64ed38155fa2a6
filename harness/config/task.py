"""What a user implements: model, data, loss, metrics. Nothing about ranks or devices.

Importing this never imports torch, so that a configuration can be checked without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import DataLoader


@dataclass(frozen=True)
class StepOutput:
    """What one batch gave.

    Args:
        loss: 0-d tensor on the model's device: the mean over `weight` items.
        weight: how many items the means of this batch are over: images, tokens, ...
        metrics: further means over the same items, each a 0-d tensor or a number.
        predictions: where the task has `eval_metrics`: what they are updated with, and
        targets: what that is compared to.
    """

    loss: Tensor
    weight: float
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    predictions: Tensor | None = None
    targets: Tensor | None = None


@runtime_checkable
class Task(Protocol):
    """A training task. `harness.tasks.Digits` is the example to copy.

    A task may also have `eval_metrics() -> Mapping[str, torchmetrics.Metric]`; they are updated with
    the `predictions` and `targets` of each evaluated batch and logged as ``eval/<name>``.

    With `input_example()`, a batch of what the model takes (a tensor, or several by the names of its arguments), the
    models in MLflow have it, and a signature; with `dynamic_axes() -> Mapping[str, Sequence[int]]` beside it, by the
    name of an input (one without a name: ``input``), axes other than the first may have any size too.
    """

    def model(self) -> nn.Module:
        """Make the model, on the CPU. Called once on each rank, with the same random seed."""
        ...

    def train_data(self) -> DataLoader[Any]:
        """Make the training loader. Its batch size is that of one process."""
        ...

    def eval_data(self) -> DataLoader[Any] | None:
        """Make the evaluation loader, or None where nothing is evaluated."""
        ...

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Run the model on one batch, in training as in evaluation.

        Args:
            model: the prepared model: call it, do not reach into it.
            batch: what the loader gave, already on the model's device.
        """
        ...
