"""The state at the end of a training pass: what a checkpoint of the evaluation behind it has to hold.

A script that was stopped within its evaluation goes on behind the pass's last batch, and does all of it again that it
had done since: it steps its scheduler, say, and draws random numbers. These are put back before such a checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from harness.autologging.script import Choice, raw
from harness.data import rng_state


class PassEnd:
    """The end of a pass, in a run of one process.

    Effects: not collective; main thread, between steps; a copy of one element of each parameter and buffer.

    Args:
        choice: what checkpoints are of.
        device: of the run.
        loader: that the pass was over.
        iteration: its number as the pass began, which accelerate has advanced since; None: it has none.
    """

    def __init__(self, choice: Choice, device: torch.device, loader: Any, iteration: int | None) -> None:
        self._choice = choice
        self._loader = loader
        self._iteration = iteration
        self._device = device
        self._random = rng_state.capture(device)
        self._scheduler = None if choice.scheduler is None else copy.deepcopy(choice.scheduler.state_dict())
        self._groups = [_without_parameters(group) for group in raw(choice.optimizer).param_groups]
        self._versions = [tensor._version for tensor in self._tensors()]
        self._samples = [_sample(tensor) for tensor in self._tensors()]

    def put_back(self) -> bool:
        """Put back what the script has changed since.

        Returns:
            False, with nothing put back, if the model was changed, which has no copy here: averaged weights are
            swapped in, say.
        """
        tensors = list(self._tensors())
        if [tensor._version for tensor in tensors] != self._versions:
            return False
        # A write by way of `.data` advances no version.
        samples = zip(tensors, self._samples, strict=True)
        if not all(torch.equal(_sample(tensor), sample) for tensor, sample in samples):
            return False
        if self._scheduler is not None:
            self._choice.scheduler.load_state_dict(self._scheduler)
        for group, before in zip(raw(self._choice.optimizer).param_groups, self._groups, strict=True):
            group.update(before)
        if self._iteration is not None:
            self._loader.iteration = self._iteration
        rng_state.restore(self._random, self._device)
        return True

    def _tensors(self) -> Iterator[Tensor]:
        model = self._choice.model
        return (each for each in chain(model.parameters(), model.buffers()) if type(each.data) is Tensor)


def _without_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}


def _sample(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((min(1, tensor.numel()),), (1,)).clone()
