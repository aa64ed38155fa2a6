"""Which classes the description of a model may name, decided before any of them is imported.

An ``MLmodel`` file is data that another person may have written. Its class must be a `torch.nn.Module`, or a
`harness.Task` that makes one. Its arguments may name further classes and functions (`described_model` decides
where) only below the top-level package of the model's class (``transformers`` for its models), below ``torch.nn``, or
below what the caller of `harness.load_model` trusts. A name that is imported there from elsewhere does not count.

Importing a module runs its code, so a model is only as trustworthy as the packages that are installed. Modules that lie
in the model's own directory, or in that of the run whose checkpoint it is, are not imported: a download into the
working directory can be found as a package.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from harness.errors import ConfigError

_TORCH = "torch.nn"
_TASK_METHODS = ("model", "train_data", "eval_data", "step")
# A class of harness's own -> the package whose models it builds.
_PACKAGE_OF = {"harness.integrations.transformers.Pretrained": "transformers"}


class TrustedClasses:
    """The classes that one model may name.

    Args:
        class_path: of the model's class, or of the task that makes it.
        came_with: directories: the model's, and for a checkpoint of a run the run's.
        trusted: further packages, modules or classes, such as ``my_layers`` or ``my_layers.blocks.Block``.
    """

    def __init__(self, class_path: str, came_with: Sequence[Path], trusted: Sequence[str] = ()) -> None:
        package = class_path.partition(".")[0]
        # torch itself holds far more than layers, such as what unpickles files and compiles source text.
        own = () if package == "torch" else (_PACKAGE_OF.get(class_path, package),)
        self._names = (_TORCH, *trusted, *own)
        self._trusted = tuple(trusted)
        self._came_with = [each.resolve() for each in came_with]

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

    def require_outside(self, place: str, path: str) -> None:
        """Refuse a path that leads through a module that came with the model.

        Effects: imports the packages that the path leads through, each once it is known to lie elsewhere.

        Raises:
            ConfigError: with the place, if it does.
        """
        parts = path.split(".")
        for count in range(1, len(parts)):
            try:
                spec = importlib.util.find_spec(".".join(parts[:count]))
            except (ImportError, AttributeError, ValueError):  # no module, or one without a specification
                return
            if spec is None:
                return
            origin = spec.origin if spec.has_location else None  # not that of a module in C
            locations = [Path(each).resolve() for each in (origin, *(spec.submodule_search_locations or ())) if each]
            # A package without a file is any directory, such as one that holds the model and what came with it.
            is_any_directory = spec.origin is None
            if any(
                each.is_relative_to(directory) or (is_any_directory and directory.is_relative_to(each))
                for each in locations
                for directory in self._came_with
            ):
                raise ConfigError(
                    place,
                    f"names {path}, which comes with the model ({locations[0]}); if you trust it, import the class "
                    "yourself and give the model to fill, with model=",
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
        self.require_outside(place, path)
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
