"""Which classes the description of a model may name, decided before any of them is imported.

An ``MLmodel`` file is data that another person may have written. Its class must be a `torch.nn.Module`, or a
`harness.Task` that makes one. Its arguments may name further classes and functions (`harness.described_model` decides
where) only below the top-level package of the model's class, below ``torch.nn``, or below what the caller of
`harness.load_model` trusts. A name that is imported there from elsewhere does not count.

Importing a module runs its code, so a model is only as trustworthy as the packages that are installed.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from harness.errors import ConfigError

_TORCH = "torch.nn"
_TASK_METHODS = ("model", "train_data", "eval_data", "step")


class TrustedClasses:
    """The classes that one model may name.

    Args:
        class_path: of the model's class, or of the task that makes it.
        trusted: further packages, modules or classes, such as ``my_layers`` or ``my_layers.blocks.Block``.
    """

    def __init__(self, class_path: str, trusted: Sequence[str] = ()) -> None:
        package = class_path.partition(".")[0]
        # torch itself holds far more than layers, such as what unpickles files and compiles source text.
        self._names = (_TORCH, *trusted, *(() if package == "torch" else (package,)))
        self._trusted = tuple(trusted)

    def require_model(self, key: str, class_path: str, found: type[Any]) -> None:
        """Refuse a class that is neither a module nor a task.

        A class of harness's own, or one that the caller trusts, needs ``model()`` alone.

        Raises:
            ConfigError: if it is another class.
        """
        is_ours = _is_below(class_path, ("harness", *self._trusted))
        methods = ("model",) if is_ours else _TASK_METHODS
        if not issubclass(found, nn.Module) and not all(callable(getattr(found, name, None)) for name in methods):
            raise ConfigError(
                f"{key}.class_path",
                f"{class_path} is neither a torch.nn.Module nor a harness.Task ({', '.join(_TASK_METHODS)}); to build "
                "it nevertheless, if you trust it, name it in load_model(..., trusted=[...])",
            )

    def find(self, place: str, path: str) -> Any:
        """Import the class or function that an argument names, by its full path.

        Effects: imports its module, if it may be named; calls nothing.

        Raises:
            ConfigError: with the place, if the path is not full, may not be named, or leads to nothing.
        """
        if not is_full_path(path):
            raise ConfigError(place, f"must be the full import path of a class or function, got {path!r}")
        if not _is_below(path, self._names):
            raise ConfigError(place, f"names {path}, {self._outside()}")
        parent, found = _imported(place, path)
        if (module := _definition(parent)) not in (None, path.rpartition(".")[0]) and not _is_below(
            module, self._names
        ):
            raise ConfigError(place, f"names {path}, which is in {module}, {self._outside()}")
        # Many functions of torch.nn are defined in torch's C part.
        allowed = (*self._names, "torch") if _is_below(path, (_TORCH,)) else self._names
        if (definition := _definition(found)) is not None and not _is_below(definition, allowed):
            raise ConfigError(place, f"names {path}, which is {definition}, {self._outside()}")
        return found

    def _outside(self) -> str:
        return (
            f"which is not below {', '.join(self._names)}; if you trust it, name its package in "
            "load_model(..., trusted=[...]), or give the model to fill, with model="
        )


def is_full_path(text: str) -> bool:
    """Whether a text has the form of a module and a name in it. Imports nothing."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _is_below(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _imported(place: str, path: str) -> tuple[Any, Any]:
    """The object at a path, which is in a module or in a class in a module, and what it is in."""
    module_path, _, name = path.rpartition(".")
    try:
        try:
            parent: Any = importlib.import_module(module_path)
        except ModuleNotFoundError:
            outer, _, inner = module_path.rpartition(".")
            if not outer:
                raise
            parent = getattr(importlib.import_module(outer), inner)
        return parent, getattr(parent, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(place, f"cannot import {path}: {error}") from error


def _definition(found: Any) -> str | None:
    """Where a module, class or function is defined; None if it does not say so, or is an object of another kind."""
    if inspect.ismodule(found):
        return found.__name__
    if not (inspect.isclass(found) or inspect.isroutine(found)) or getattr(found, "__module__", None) is None:
        return None
    return f"{found.__module__}.{found.__qualname__}"
