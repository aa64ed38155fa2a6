"""Save autologging's part of a checkpoint, and reset state before a checkpoint within an evaluation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from harness.autologging.iterations import TrainingIterations
from harness.autologging.script import CheckpointContent, Prepared, raw
from harness.data import rng_state
from harness.errors import CheckpointError


class AutologState:
    """Holds what a resumed run needs to know about the script's earlier iterations.

    Attributes:
        training: predicts which iterations train.
        optimizer: index of the prepared optimizer that checkpoints contain.
        num_states: number of states that `accelerator.save_state` had saved at the checkpoint that the run resumes
            from; None for a new run, and once the resumed run has numbered a state.
    """

    def __init__(self, training: TrainingIterations, prepared: Prepared) -> None:
        self.training = training
        self._prepared = prepared
        self.optimizer = 0
        self.num_states: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the current state as JSON values."""
        accelerator = self._prepared.accelerator
        num_states = 0 if accelerator is None else accelerator.project_configuration.iteration
        return {
            "trained": self.training.state_dict(),
            "iterations": [getattr(loader, "iteration", 0) for loader in self._prepared.loaders],
            "optimizer": self.optimizer,
            # accelerate counts replayed states again, until the resumed script saves a new one.
            "num_states": max(num_states, self.num_states or 0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.training.load_state_dict(state["trained"])
        self.num_states = state["num_states"]
        for loader, iteration in zip(self._prepared.loaders, state["iterations"], strict=False):
            # accelerate seeds the order of an iteration with this count.
            if hasattr(loader, "iteration"):
                loader.iteration = iteration


def require_first_optimizer(state: Mapping[str, Any] | None) -> None:
    """Refuse to resume from a checkpoint of an optimizer that the script makes only during training.

    `state` is that of the previous run's `AutologState`, or None for a new run.

    Raises:
        CheckpointError: on all ranks alike.
    """
    if state is not None and state["optimizer"] > 0:
        raise CheckpointError(
            f"the checkpoint contains the script's optimizer number {state['optimizer'] + 1}, which the script makes "
            "during training, so it cannot be restored from outside; give another run_name, or write the loop with "
            "PeriodicLogger"
        )


class IterationEnd:
    """Captures the state at the end of a training iteration, for a checkpoint within the evaluation that follows.

    A script that is stopped within its evaluation resumes after the last training batch, and repeats what it did since,
    for example stepping its scheduler and drawing random numbers. These are reset before the checkpoint.

    Effects: not collective; main thread, between steps; one process. Copies one element of each parameter and buffer.

    Args:
        iteration: the loader's count of iterations as this one began, which accelerate has advanced; None if the loader
            does not count.
    """

    def __init__(self, content: CheckpointContent, device: torch.device, loader: Any, iteration: int | None) -> None:
        self._content = content
        self._loader = loader
        self._iteration = iteration
        self._device = device
        self._rng_state = rng_state.capture(device)
        self._scheduler = None if content.scheduler is None else copy.deepcopy(content.scheduler.state_dict())
        self._groups = [_without_parameters(group) for group in raw(content.optimizer).param_groups]
        self._versions = [tensor._version for tensor in self._tensors()]
        self._samples = [_sample(tensor) for tensor in self._tensors()]

    def restore(self) -> bool:
        """Reset what the script has changed since.

        Returns False, with nothing reset, if the script has changed the model, for example by swapping in averages.
        """
        tensors = list(self._tensors())
        if [tensor._version for tensor in tensors] != self._versions:
            return False
        # A write through `.data` does not advance the version.
        samples = zip(tensors, self._samples, strict=True)
        if not all(torch.equal(_sample(tensor), sample) for tensor, sample in samples):
            return False
        if self._scheduler is not None:
            self._content.scheduler.load_state_dict(self._scheduler)
        for group, before in zip(raw(self._content.optimizer).param_groups, self._groups, strict=True):
            group.update(before)
        if self._iteration is not None:
            self._loader.iteration = self._iteration
        rng_state.restore(self._rng_state, self._device)
        return True

    def _tensors(self) -> Iterator[Tensor]:
        model = self._content.model
        return (each for each in chain(model.parameters(), model.buffers()) if type(each.data) is Tensor)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((min(1, tensor.numel()),), (1,)).clone()
