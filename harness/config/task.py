"""Define the protocol that a user implements: model, data, loss and metrics, without ranks or devices.

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
    """The result of one batch.

    Args:
        loss: mean over `weight` items, a 0-d tensor on the model's device.
        weight: number of items over which this batch's means are computed, such as images or tokens.
        metrics: further means over the same items, each a 0-d tensor or a number.
        predictions: input of the task's `eval_metrics`, together with the targets.
    """

    loss: Tensor
    weight: float
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
    predictions: Tensor | None = None
    targets: Tensor | None = None


@runtime_checkable
class Task(Protocol):
    """A training task, such as `harness.tasks.Digits`. These three further methods are optional.

    - `eval_metrics() -> Mapping[str, torchmetrics.Metric]`: metrics that are updated with the `predictions` and
      `targets` of each evaluated batch, and logged as ``eval/<name>``.
    - `input_example()`: a batch of the model's inputs, as a tensor or as tensors by argument name. The models in MLflow
      then have this example and a signature.
    - `dynamic_axes() -> Mapping[str, Sequence[int]]`: the axes of each input, beside the first, that may have any size
      in that signature. A single input is named ``input``.
    """

    def model(self) -> nn.Module:
        """Construct the model on the CPU. Called once on each rank, with the same random seed."""
        ...

    def train_data(self) -> DataLoader[Any]:
        """Construct the training loader, with the batch size of one process."""
        ...

    def eval_data(self) -> DataLoader[Any] | None:
        """Construct the evaluation loader, or return None for no evaluation."""
        ...

    def step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Run the model on one batch, which is on its device, in training and in evaluation.

        The model is prepared. Call it as a whole, and do not use its submodules.
        """
        ...
