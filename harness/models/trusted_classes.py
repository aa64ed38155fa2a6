"""Check the classes that a model spec names before any of them is imported.

An ``MLmodel`` file is untrusted data. Its class must be a `torch.nn.Module`, or a `harness.Task` that constructs one.
Its arguments may name further classes and functions, in the positions that `described_model` allows, but only below

- the top-level package of the model's class (``transformers`` for its models),
- ``torch.nn``, or
- the names that the caller of `harness.load_model` trusts.

A name that such a module imports from another package is refused.

Importing a module runs its code, so a model is only as trustworthy as the installed packages. Python can find a
download in the working directory as a package. Modules in the model's own directory, or in that of a checkpoint's run,
are therefore not imported.
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
# Class of harness -> package of the models that it builds.
_PACKAGE_OF = {"harness.integrations.transformers.Pretrained": "transformers"}


class TrustedClasses:
    """Decides which classes one model may name.

    Args:
        class_path: the model's class, or the task that constructs it.
        untrusted_dirs: the model's directory and, for a checkpoint, its run's.
        trusted: further packages, modules or classes, such as ``my_layers`` or ``my_layers.blocks.Block``.
    """

    def __init__(self, class_path: str, untrusted_dirs: Sequence[Path], trusted: Sequence[str] = ()) -> None:
        package = class_path.partition(".")[0]
        # torch itself also has functions that unpickle files and compile source text.
        own = () if package == "torch" else (_PACKAGE_OF.get(class_path, package),)
        self._names = (_TORCH, *trusted, *own)
        self._trusted = tuple(trusted)
        self._untrusted_dirs = [each.resolve() for each in untrusted_dirs]

    def require_model(self, key: str, class_path: str, found: type[Any]) -> None:
        """Refuse a class that is neither a module nor a task. Harness's and trusted classes need only ``model()``.

        Raises:
            ConfigError: with the place and the remedy.
        """
        is_ours = _is_below(class_path, ("harness", *self._trusted))
        methods = ("model",) if is_ours else _TASK_METHODS
        if not issubclass(found, nn.Module) and not all(callable(getattr(found, name, None)) for name in methods):
            raise ConfigError(
                f"{key}.class_path",
                f"{class_path} is neither a torch.nn.Module nor a harness.Task ({', '.join(_TASK_METHODS)}); if you "
                "trust it, name it in load_model(..., trusted=[...])",
            )

    def require_outside(self, place: str, path: str) -> None:
        """Refuse an import path through a module in an untrusted directory.

        Effects: imports the packages along the path, each after its location was checked.

        Raises:
            ConfigError: with the place and the module's location.
        """
        parts = path.split(".")
        for count in range(1, len(parts)):
            try:
                spec = importlib.util.find_spec(".".join(parts[:count]))
            except (ImportError, AttributeError, ValueError):  # not a module, or a module without a spec
                return
            if spec is None:
                return
            origin = spec.origin if spec.has_location else None  # builtin modules have none
            locations = [Path(each).resolve() for each in (origin, *(spec.submodule_search_locations or ())) if each]
            # A namespace package can be any directory, including one that contains the untrusted directory.
            is_namespace = spec.origin is None
            if any(
                each.is_relative_to(directory) or (is_namespace and directory.is_relative_to(each))
                for each in locations
                for directory in self._untrusted_dirs
            ):
                raise ConfigError(
                    place,
                    f"names {path}, which is in the model's own directory ({locations[0]}); if you trust it, import "
                    "the class yourself and pass the model to fill, with model=",
                )

    def find(self, place: str, path: str) -> Any:
        """Import the class or function that an argument names by its full path.

        Effects: imports its module if the name is allowed; calls nothing.

        Raises:
            ConfigError: if the path is not a full one, is not allowed, or does not exist.
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
        # Many functions of torch.nn are defined in torch's C extension.
        allowed = (*self._names, "torch") if _is_below(path, (_TORCH,)) else self._names
        if (definition := _definition(found)) is not None and not _is_below(definition, allowed):
            raise ConfigError(place, f"names {path}, which is {definition}, {self._outside()}")
        return found

    def _outside(self) -> str:
        return (
            f"which is not below {', '.join(self._names)}; if you trust it, name its package in "
            "load_model(..., trusted=[...]), or pass the model to fill, with model="
        )


def is_full_path(text: str) -> bool:
    """Whether text has the form of a module and a name in it; imports nothing."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _is_below(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _imported(place: str, path: str) -> tuple[Any, Any]:
    """Return the parent (a module, or a class in a module) and the object of an import path."""
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
    """Return where a module, class or function is defined; None if unknown, or for another kind of object."""
    if inspect.ismodule(found):
        return found.__name__
    if not (inspect.isclass(found) or inspect.isroutine(found)) or getattr(found, "__module__", None) is None:
        return None
    return f"{found.__module__}.{found.__qualname__}"
