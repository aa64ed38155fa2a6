"""What a script has handed to accelerate, and the values that it was started with."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from harness.checkpoint.format.names import unwrapped
from harness.checkpoint.state.schedules import COUNTED

# What schedulers move in an optimizer.
_MOVED = ("lr", "betas", "momentum")


@dataclass(frozen=True)
class Choice:
    """What a checkpoint is of.

    Args:
        model: prepared.
        optimizer: prepared; None: it cannot be told which one, so checkpoints are of the model alone.
        scheduler: prepared, or the script's own, or several as one; None: there is none.
        note: what the user is to know of it; empty: nothing.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    note: str = ""


@dataclass
class Prepared:
    """What has gone through `Accelerator.prepare`, as it came out, in order.

    Attributes:
        accelerator: the last one.
        hyperparameters: of optimizer and scheduler, as they were before training, by name.
        is_apart: whether each rank trains a model of its own, as under LocalSGD.
        join: what the script is within by which ranks join those that have more batches; None: nothing.
    """

    accelerator: Accelerator | None = None
    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    is_apart: bool = False
    join: Any = None

    def add(self, accelerator: Accelerator, given: Sequence[Any], prepared: Sequence[Any]) -> None:
        """What one call was given, and what it has returned."""
        self.accelerator = accelerator
        for before, after in zip(given, prepared, strict=True):
            kind = kind_of(before)
            if kind is None:
                continue
            known: list[Any] = getattr(self, kind)
            if any(after is each for each in known):
                continue
            known.append(after)
            if kind == "optimizers" and "optimizer" not in self.hyperparameters:
                self.hyperparameters["optimizer"] = optimizer_values(before)
            if kind == "schedulers" and "scheduler" not in self.hyperparameters:
                self.hyperparameters["scheduler"] = scheduler_values(before)

    @property
    def num_processes(self) -> int:
        """Of the accelerator."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    def know(self, loader: Any) -> None:
        """A loader is iterated over, which may be prepared for a training before: it is one of these from now on."""
        if self.index_of(loader) is None:
            self.loaders.append(loader)

    def index_of(self, loader: Any) -> int | None:
        """Which of the loaders reads the same data set; None: none."""
        dataset = getattr(loader, "dataset", loader)
        for index, each in enumerate(self.loaders):
            if each is loader:
                return index
        return next((i for i, each in enumerate(self.loaders) if getattr(each, "dataset", None) is dataset), None)

    def choose(self) -> Choice | str:
        """What checkpoints are of; or why that cannot be told, where that was not said."""
        if self.is_apart:
            return ""
        trained = [model for model in self.models if any(p.requires_grad for p in model.parameters())]
        if len(trained) != 1:
            names = ", ".join(type(getattr(model, "module", model)).__name__ for model in trained)
            return f"{len(trained)} models were prepared that can be trained ({names})" if trained else "no model was"
        if len(self.optimizers) != 1:
            note = (
                f"{len(self.optimizers)} optimizers were prepared for the one model: checkpoints hold the model alone, "
                "and where the run goes on the optimizers begin anew"
            )
            return Choice(trained[0], None, None, note)
        schedulers = self.schedulers or _schedulers_of(self.optimizers[0])
        if schedulers and "scheduler" not in self.hyperparameters:
            self.hyperparameters["scheduler"] = scheduler_values(schedulers[0])
        return Choice(trained[0], self.optimizers[0], _as_one(schedulers))

    def number_of(self, optimizer: Any) -> int | None:
        """Which of the optimizers this one is, given as torch has it; None: none."""
        return next((number for number, each in enumerate(self.optimizers) if raw(each) is optimizer), None)

    def steps(self, optimizer: Any, model: nn.Module | None) -> bool:
        """Whether this is one of the optimizers, given as torch has it, and of the model's parameters."""
        if model is None or self.number_of(optimizer) is None:
            return False
        own = {id(each) for each in model.parameters()}
        return any(id(each) in own for group in optimizer.param_groups for each in group["params"])

    def scheduler_of(self, optimizer: Any) -> Any:
        """The scheduler, or several as one, of an optimizer that is given as torch has it; None: there is none."""
        prepared = [each for each in self.schedulers if raw(each) is optimizer]
        return _as_one(prepared or _schedulers_of(optimizer))


def kind_of(given: Any) -> str | None:
    """Which list of `Prepared` this belongs in; None: none."""
    if isinstance(given, nn.Module):
        return "models"
    if isinstance(given, DataLoader):
        return "loaders"
    if isinstance(given, torch.optim.Optimizer) or type(given).__name__ == "DummyOptim":
        return "optimizers"
    if hasattr(given, "step") and hasattr(given, "optimizer"):
        return "schedulers"
    return None


class _Schedulers:
    """Several schedulers of one optimizer, each in its own time, as one."""

    def __init__(self, schedulers: Sequence[Any]) -> None:
        # By what they are: in which order they are found may differ between two processes.
        known = sorted(schedulers, key=lambda each: repr(sorted(scheduler_values(each).items())))
        self.named = {f"{number}": each for number, each in enumerate(known)}

    def state_dict(self) -> dict[str, Any]:
        """The state of each."""
        return {name: each.state_dict() for name, each in self.named.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        for name, each in self.named.items():
            each.load_state_dict(state[name])


def _as_one(schedulers: Sequence[Any]) -> Any:
    if len(schedulers) > 1:
        return _Schedulers(schedulers)
    return schedulers[0] if schedulers else None


def _schedulers_of(optimizer: Any) -> list[Any]:
    """The schedulers that a script steps itself, looked for once among all objects: the outermost ones."""
    inner = raw(optimizer)
    found = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), LRScheduler) and getattr(each, "optimizer", None) is inner
    ]
    parts = {id(part) for each in found for part in getattr(each, "_schedulers", ())}
    return [each for each in found if id(each) not in parts]


def raw(optimizer: Any) -> Any:
    """The optimizer inside what accelerate, or DeepSpeed, has put around it."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def inside(things: Sequence[Any]) -> list[Any]:
    """Prepared things, and what accelerate has wrapped in them: as a script had them before."""
    found = [each for each in things if each is not None]
    for each in found:  # which grows meanwhile
        if isinstance(each, nn.Module):
            found += [inner] if (inner := unwrapped(each)) is not each else []
        elif isinstance(each, _Schedulers):
            found += each.named.values()
        else:
            within = getattr(each, "scheduler", None) or getattr(each, "optimizer", None)
            found += [] if within is None else [within]
    return found


def optimizer_values(optimizer: Any) -> dict[str, Any]:
    """What an optimizer was made with; for each of its groups what differs there."""
    defaults = {name: value for name, value in getattr(optimizer, "defaults", {}).items() if _is_plain(value)}
    values: dict[str, Any] = {"class": type(optimizer).__name__, **defaults}
    groups = getattr(optimizer, "param_groups", [])
    own = [
        {
            name: group[name]
            for name in defaults
            if _is_plain(group.get(name))
            and group[name] != defaults[name]
            # What a scheduler has begun to move, it was not made with.
            and not ("initial_lr" in group and name in _MOVED)
        }
        for group in groups
    ]
    if len(own) == 1:
        values |= own[0]
    else:
        values |= {f"group{index}": each for index, each in enumerate(own) if each}
    return values


def scheduler_values(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with, as far as its state has it."""
    state = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    kept = {
        name: sorted(value) if isinstance(value, Mapping) else value
        for name, value in state.items()
        if not name.startswith("_") and name not in COUNTED and _is_plain(value)
    }
    return {"class": type(scheduler).__name__, **kept}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(isinstance(key, (int, float)) for key in value)
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (int, float, str)) for item in value)
    return isinstance(value, (bool, int, float, str))


class Arguments:
    """The values that the script's own parser has given: of what was typed behind the script's name."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def parsed(self, words: Sequence[str] | None, namespace: argparse.Namespace) -> None:
        """A parser has parsed these words; those of the command line are the script's."""
        if words is None or list(words) == sys.argv[1:]:
            self.values = {name: value for name, value in vars(namespace).items() if not callable(value)}

    def look(self) -> Mapping[str, Any]:
        """The values; where parsing was over before autologging began, from the script's own variables."""
        if not self.values:
            for value in list(vars(sys.modules["__main__"]).values()):
                if isinstance(value, argparse.Namespace):
                    self.parsed(None, value)
        return self.values
