"""What ``trainer_state.json`` holds of an optimizer beside its parameter groups.

    "class"   of the optimizer inside all wrappers, by which another one is refused
    "forms"   of states that are more than a dict of tensors: each distinct form once, with its parameters

Both are missing in checkpoints that an earlier version has written.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.checkpoint.shards.held import Held, innermost
from harness.checkpoint.shards.state_form import Form, checked
from harness.errors import CheckpointError


@dataclass(frozen=True)
class OptimizerRecord:
    """The record, as it was read.

    Args:
        class_name: module and name of the class; None: not known, or there was no optimizer.
        forms: parameter -> form of its state, where that does not follow from the names in the file.
    """

    class_name: str | None = None
    forms: Mapping[str, Form] = field(default_factory=dict)

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> OptimizerRecord:
        """The record of a JSON object.

        Raises:
            ValueError: if something in it is of another type.
        """
        name = record.get("class")
        if not (name is None or isinstance(name, str)):
            raise ValueError("the optimizer's class is no text")
        return cls(name, _forms(record.get("forms", [])))


def record_of(held: Held, optimizer: Any) -> dict[str, Any]:
    """The record of an optimizer as it is now, as JSON values.

    Effects: not collective; main thread, between steps; nothing on disk.

    Args:
        held: found with this optimizer.
        optimizer: wrapped or not; None: there is none.
    """
    record: dict[str, Any] = {"param_groups": held.hyperparameters()}
    if optimizer is not None:
        record["class"] = class_name(innermost(optimizer))
    if held.forms:
        distinct: dict[str, dict[str, Any]] = {}
        for name, form in held.forms.items():
            entry = distinct.setdefault(json.dumps(form), {"form": form, "parameters": []})
            entry["parameters"].append(name)
        record["forms"] = list(distinct.values())
    return record


def check_step(optimizer: Any) -> None:
    """Refuse an optimizer that steps by calling the loop's forward and backward itself.

    Effects: not collective, and the same on every rank; nothing on disk.

    Args:
        optimizer: wrapped or not; None: there is none.

    Raises:
        CheckpointError: if its step needs a closure.
    """
    optimizer = innermost(optimizer)
    if optimizer is None:
        return
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise CheckpointError(
            f"{type(optimizer).__name__}: its step needs a closure, and training with it cannot be resumed; use "
            "checkpoint.save_weights_only: true, or another optimizer"
        )


def class_name(optimizer: Any) -> str:
    """By which an optimizer is told from another kind: the module and the name of its class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _forms(entries: Any) -> dict[str, Form]:
    forms: dict[str, Form] = {}
    if not isinstance(entries, list):
        raise ValueError("forms is no list")
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() != {"form", "parameters"}:
            raise ValueError("an entry of forms has not a form and parameters alone")
        form, names = checked(entry["form"]), entry["parameters"]
        if not isinstance(form, dict) or form.keys() != {"dict"}:
            raise ValueError("the form of an optimizer's state is no dict")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("the parameters of a form are no names")
        forms |= dict.fromkeys(names, form)
    return forms
