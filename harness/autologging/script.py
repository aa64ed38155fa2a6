"""Collect the objects that a script has prepared with accelerate, and its command-line arguments."""

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

# Optimizer values that schedulers change.
_SCHEDULED = ("lr", "betas", "momentum")


@dataclass(frozen=True)
class CheckpointContent:
    """Describes what a checkpoint contains.

    Args:
        optimizer: None if several were prepared, and checkpoints contain the model alone.
        scheduler: prepared or made by the script, several combined into one; None if there is none.
        note: a message for the user; empty if none is needed.
    """

    model: nn.Module
    optimizer: Any
    scheduler: Any
    note: str = ""


@dataclass
class Prepared:
    """Collects the results of `Accelerator.prepare`, in order.

    Attributes:
        accelerator: the latest one.
        hyperparameters: optimizer and scheduler values before training, by name.
        has_local_weights: whether the weights differ between ranks, as under LocalSGD.
        join: torch's `Join` context (ranks with fewer batches) around the script's current code; None outside of one.
    """

    accelerator: Accelerator | None = None
    models: list[nn.Module] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    schedulers: list[Any] = field(default_factory=list)
    loaders: list[Any] = field(default_factory=list)
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    has_local_weights: bool = False
    join: Any = None

    def add(self, accelerator: Accelerator, given: Sequence[Any], prepared: Sequence[Any]) -> None:
        """Add the arguments and results of one call."""
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
        """Number of ranks."""
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank logs; True before there is an accelerator."""
        return self.accelerator is None or bool(self.accelerator.process_index == 0)

    def add_loader(self, loader: Any) -> None:
        """Add a loader that was prepared for an earlier training."""
        if self.index_of(loader) is None:
            self.loaders.append(loader)

    def index_of(self, loader: Any) -> int | None:
        """Return the index of the loader that reads the same data set; None if no loader does."""
        dataset = getattr(loader, "dataset", loader)
        for index, each in enumerate(self.loaders):
            if each is loader:
                return index
        return next((i for i, each in enumerate(self.loaders) if getattr(each, "dataset", None) is dataset), None)

    def checkpoint_content(self) -> CheckpointContent | str:
        """Return what checkpoints contain, or why there are none; empty if the reason was already reported."""
        if self.has_local_weights:
            return ""
        trained = [model for model in self.models if any(p.requires_grad for p in model.parameters())]
        if len(trained) != 1:
            names = ", ".join(type(getattr(model, "module", model)).__name__ for model in trained)
            return f"{len(trained)} models were prepared that can be trained ({names})" if trained else "no model was"
        if len(self.optimizers) != 1:
            note = (
                f"{len(self.optimizers)} optimizers were prepared for one model: checkpoints contain the model alone, "
                "and a resumed run starts with new optimizers"
            )
            return CheckpointContent(trained[0], None, None, note)
        schedulers = self.schedulers or _schedulers_of(self.optimizers[0])
        if schedulers and "scheduler" not in self.hyperparameters:
            self.hyperparameters["scheduler"] = scheduler_values(schedulers[0])
        return CheckpointContent(trained[0], self.optimizers[0], _as_one(schedulers))

    def number_of(self, optimizer: Any) -> int | None:
        """Return the index of a torch optimizer among the prepared ones; None if it was not prepared."""
        return next((number for number, each in enumerate(self.optimizers) if raw(each) is optimizer), None)

    def steps(self, optimizer: Any, model: nn.Module | None) -> bool:
        """Whether a torch optimizer was prepared and updates parameters of the model."""
        if model is None or self.number_of(optimizer) is None:
            return False
        own = {id(each) for each in model.parameters()}
        return any(id(each) in own for group in optimizer.param_groups for each in group["params"])

    def scheduler_of(self, optimizer: Any) -> Any:
        """Return the scheduler of a torch optimizer, several combined into one; None if it has none."""
        prepared = [each for each in self.schedulers if raw(each) is optimizer]
        return _as_one(prepared or _schedulers_of(optimizer))


def kind_of(given: Any) -> str | None:
    """Return the name of the list in `Prepared` that an object belongs to; None for other objects."""
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
    def __init__(self, schedulers: Sequence[Any]) -> None:
        # Sort by values, since processes may find them in different orders.
        known = sorted(schedulers, key=lambda each: repr(sorted(scheduler_values(each).items())))
        self.named = {f"{number}": each for number, each in enumerate(known)}

    def state_dict(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.named.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in self.named.items():
            each.load_state_dict(state[name])


def _as_one(schedulers: Sequence[Any]) -> Any:
    if len(schedulers) > 1:
        return _Schedulers(schedulers)
    return schedulers[0] if schedulers else None


def _schedulers_of(optimizer: Any) -> list[Any]:
    """Find the outermost schedulers that a script steps without preparing them, among all objects of Python."""
    inner = raw(optimizer)
    found = [
        each
        for each in gc.get_objects()
        if issubclass(type(each), LRScheduler) and getattr(each, "optimizer", None) is inner
    ]
    parts = {id(part) for each in found for part in getattr(each, "_schedulers", ())}
    return [each for each in found if id(each) not in parts]


def raw(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate or DeepSpeed."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


def with_unwrapped(prepared: Sequence[Any]) -> list[Any]:
    """Return prepared objects and the script's own objects inside them."""
    found = [each for each in prepared if each is not None]
    for each in found:  # the list grows in the loop
        if isinstance(each, nn.Module):
            found += [inner] if (inner := unwrapped(each)) is not each else []
        elif isinstance(each, _Schedulers):
            found += each.named.values()
        else:
            within = getattr(each, "scheduler", None) or getattr(each, "optimizer", None)
            found += [] if within is None else [within]
    return found


def optimizer_values(optimizer: Any) -> dict[str, Any]:
    """Return the values that an optimizer was made with, and those of each group that differ."""
    defaults = {name: value for name, value in getattr(optimizer, "defaults", {}).items() if _is_plain(value)}
    values: dict[str, Any] = {"class": type(optimizer).__name__, **defaults}
    groups = getattr(optimizer, "param_groups", [])
    own = [
        {
            name: group[name]
            for name in defaults
            if _is_plain(group.get(name))
            and group[name] != defaults[name]
            # Skip values that a scheduler has changed.
            and not ("initial_lr" in group and name in _SCHEDULED)
        }
        for group in groups
    ]
    if len(own) == 1:
        values |= own[0]
    else:
        values |= {f"group{index}": each for index, each in enumerate(own) if each}
    return values


def scheduler_values(scheduler: Any) -> dict[str, Any]:
    """Return the values that a scheduler was made with, as far as its state contains them."""
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
    """Keeps the values that the script's argument parser returned for its command line."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def parsed(self, words: Sequence[str] | None, namespace: argparse.Namespace) -> None:
        """Keep a parser's result if it parsed the command line."""
        if words is None or list(words) == sys.argv[1:]:
            self.values = {name: value for name, value in vars(namespace).items() if not callable(value)}

    def current(self) -> Mapping[str, Any]:
        """Return the values, from a variable of the script if it parsed them before autologging began."""
        if not self.values:
            for value in list(vars(sys.modules["__main__"]).values()):
                if isinstance(value, argparse.Namespace):
                    self.parsed(None, value)
        return self.values
