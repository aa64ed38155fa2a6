"""Optimizers of the kinds that keep more than a dict of tensors; each part of their state decides on the next step."""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Projector:
    """Keeps a matrix that it finds in the first gradient, as GaLore's."""

    def __init__(self) -> None:
        self.factors: list[Tensor] | None = None
        self.num_calls = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        if self.factors is None:
            self.factors = [1 + gradient.abs(), torch.ones(1)]
        self.num_calls += 1
        return gradient * self.factors[0] * self.num_calls

    def state_dict(self) -> dict[str, Any]:
        factors = None if self.factors is None else [factor.clone() for factor in self.factors]
        return {"factors": factors, "num_calls": self.num_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factors, self.num_calls = state["factors"], state["num_calls"]


class OfTrees(torch.optim.Optimizer):
    """Containers as SOAP, Kron and AdaShift have them."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, self.state[parameter], group["lr"])

    def _update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            state["GG"] = [torch.zeros(3), None, []]
            state["count"] = torch.zeros((), dtype=torch.int64)
            state["turned"] = torch.zeros(7, 5).t()
            state["queue"] = deque([gradient.clone()], maxlen=2)
            state["pair"] = (torch.zeros_like(parameter), 0)
            state[0] = torch.zeros_like(parameter)
            state["by_name"] = {"rate": 1.0, "mode": "slow", 3: {"is_first": True}}
            state["num_steps"], state["nothing"] = 0, None
        state["GG"] = [state["GG"][0] + 1, None, []]
        state["count"] += 1
        state[0] += gradient
        state["queue"].append(gradient.clone())
        state["pair"] = (state["pair"][0] + gradient, state["pair"][1] + 1)
        state["num_steps"] += 1
        names = state["by_name"]
        scale = 2.0 if names[3]["is_first"] else 1.0
        names["rate"] *= 0.5
        names[3]["is_first"] = False
        update = state[0] + state["queue"][0] + state["pair"][0] / state["pair"][1]
        numbers = state["GG"][0].sum() + state["count"] + state["num_steps"] + names["rate"]
        parameter.sub_(update * numbers, alpha=lr * scale)


class Norm(IntEnum):
    """A hyperparameter, as Scion's."""

    FROBENIUS = 1


class OfShared(torch.optim.Adam):
    """State that belongs to no parameter, wherever an optimizer can have it; all of it decides on the next step."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, lr=lr)
        self.total_step = 0
        self.mask = torch.zeros(2, 3)
        self.param_groups[0]["weights"] = torch.ones(4)
        self.param_groups[0]["filter"] = len
        self.param_groups[0]["norm"] = Norm.FROBENIUS

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        shared: Any = self.state
        shared["num_steps"] = shared.get("num_steps", 0) + 1
        shared.setdefault("ema", {})["long"] = torch.full((3,), float(shared["num_steps"]))
        self.total_step += 1
        self.mask = self.mask + self.total_step
        group = self.param_groups[0]
        group["weights"].mul_(0.5)
        factor = shared["ema"]["long"].sum() + self.mask.sum() + group["weights"].sum() + shared["num_steps"]
        for parameter in group["params"]:
            parameter.grad.mul_(factor)
        super().step(closure)
        for parameter in group["params"]:
            wide = self.state[parameter].setdefault("wide", torch.zeros_like(parameter, dtype=torch.float64))
            parameter.sub_(wide.add_(parameter.grad), alpha=1e-3)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total_step": self.total_step, "mask": self.mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total_step = state.pop("total_step")
        self.mask = state.pop("mask")
        super().load_state_dict(state)


class OfObjects(torch.optim.Optimizer):
    """An object for each parameter, and counters everywhere that a step in between would move."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})
        self.num_steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.num_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["projectors"] = [Projector()]
                        state["moment"] = torch.zeros_like(parameter)
                    state["moment"].lerp_(state["projectors"][0](parameter.grad), 0.5)
                    parameter.sub_(state["moment"], alpha=group["lr"])


class Numbered(torch.optim.Optimizer):
    """A state of tensors alone, under numbers."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            moment = self.state[parameter].setdefault(0, torch.zeros_like(parameter))
            parameter.sub_(moment.add_(parameter.grad), alpha=self.param_groups[0]["lr"])


class MadeEarly(OfObjects):
    """Makes a part of its state in `__init__`, before there is a checkpoint to restore."""

    def __init__(self, parameters: Any, lr: float = 0.01) -> None:
        super().__init__(parameters, lr)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = self._early(parameter)

    def _early(self, parameter: Tensor) -> dict[str, Any]:
        return {"moment": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            projector = state.setdefault("projector", Projector())
            state["moment"].lerp_(projector(parameter.grad), 0.5)
            parameter.sub_(state["moment"], alpha=self.param_groups[0]["lr"])


class AllMadeEarly(MadeEarly):
    """Makes its objects in `__init__` too."""

    def _early(self, parameter: Tensor) -> dict[str, Any]:
        return {"moment": torch.zeros_like(parameter), "projector": Projector()}
