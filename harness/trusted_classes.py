"""Which classes the description of a model may have built, decided before any of them is imported.

An ``MLmodel`` file is data that another person may have written. Its class must be a `torch.nn.Module`, or a
`harness.Task` that makes one. Its arguments may name further classes and functions only

- where the annotation of the parameter asks for one (``Any`` and no annotation do not), and
- below the top-level package of the model's class, below ``torch.nn``, or below what the caller of
  `harness.load_model` trusts. A name that is imported there from elsewhere does not count.

Importing a module runs its code, so a model is only as trustworthy as the packages that are installed.
"""

from __future__ import annotations

import collections.abc
import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from torch import nn

from harness.build import class_parser, load_class
from harness.errors import ConfigError

_TORCH = "torch.nn"
# Their classes do not ask for a class to be named: `object`, `Any`, containers, paths, restricted numbers.
_PLAIN_MODULES = {*sys.stdlib_module_names, "jsonargparse"}
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
        self._trusted = trusted

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

    def check_arguments(self, key: str, found: type[Any], init_args: Mapping[str, Any]) -> None:
        """Check what the arguments name, at any depth.

        Effects: imports the classes that are named and allowed; calls nothing.

        Raises:
            ConfigError: with the place of the first name that is not allowed.
        """
        actions = class_parser(found, sub_configs=False)._actions
        hints = {action.dest: action._typehint for action in actions if hasattr(action, "_typehint")}
        for name, value in init_args.items():
            self._check_argument(f"{key}.{name}", name, value, hints)

    def _check_argument(self, place: str, name: str, value: Any, hints: Mapping[str, Any]) -> None:
        is_group = name not in hints and any(each.startswith(f"{name}.") for each in hints)
        if not is_group:
            self._check_value(place, hints.get(name, Any), value)
            return
        # A dataclass: each field is an argument. jsonargparse would take a text for the name of a file to read.
        if not isinstance(value, Mapping):
            raise ConfigError(place, f"must be a mapping, got {value!r}")
        for key, item in value.items():
            self._check_argument(f"{place}.{key}", f"{name}.{key}", item, hints)

    def _check_value(self, place: str, hint: Any, value: Any) -> None:
        members = list(_members(hint))
        asked = [member for member in members if _asks_for_class(member)]
        if isinstance(value, str):
            if any(member not in (str, types.NoneType) for member in members):
                self._check_text(place, hint, value, is_asked=bool(asked))
        elif isinstance(value, Mapping):
            self._check_mapping(place, members, asked, value)
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                self._check_value(f"{place}[{index}]", _items_of(members), item)

    def _check_text(self, place: str, hint: Any, text: str, *, is_asked: bool) -> None:
        # jsonargparse reads a text as YAML where another type than text is expected.
        try:
            parsed = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            parsed = None
        if isinstance(parsed, (Mapping, list)):
            self._check_value(place, hint, parsed)
        elif is_asked and _is_import_path(text):
            self._require_trusted(place, text)
            _require_defined(place, text, _find(place, text), self._names)

    def _check_mapping(self, place: str, members: list[Any], asked: list[Any], value: Mapping[str, Any]) -> None:
        if any("class_path" in str(key) for key in value):
            self._check_class(place, asked, value)
            return
        # Without class_path it may be the arguments of the class that the annotation names.
        classes = [member for member in asked if inspect.isclass(member) and member is not type]
        for found in classes:
            self.check_arguments(place, found, value)
        if not classes or any(_is_mapping(member) for member in members):
            for key, item in value.items():
                self._check_value(f"{place}.{key}", _items_of(members), item)

    def _check_class(self, place: str, asked: list[Any], value: Mapping[str, Any]) -> None:
        class_path = value.get("class_path")
        if not isinstance(class_path, str) or not asked:
            raise ConfigError(place, f"names the class {class_path!r}, but the constructor asks for no class there")
        self._require_trusted(place, class_path)
        found = load_class(place, class_path)
        _require_defined(place, class_path, found, self._names)
        for name, item in value.items():
            if name == "init_args" and isinstance(item, Mapping):
                self.check_arguments(f"{place}.init_args", found, item)
            elif name != "class_path":
                self._check_value(f"{place}.{name}", Any, item)

    def _require_trusted(self, place: str, path: str) -> None:
        if not _is_below(path, self._names):
            raise ConfigError(place, f"names {path}, {_outside(self._names)}")


def _outside(names: Sequence[str]) -> str:
    return (
        f"which is not below {', '.join(names)}; if you trust it, name its package in load_model(..., trusted=[...]), "
        "or give the model to fill, with model="
    )


def _require_defined(place: str, path: str, found: Any, names: Sequence[str]) -> None:
    """Refuse what is only imported at `path`, and defined where nothing may be named."""
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        return
    module = getattr(found, "__module__", None)
    # Many functions of torch.nn are defined in torch's C part.
    is_torchs = _is_below(path, (_TORCH,)) and (module is None or _is_below(module, ("torch",)))
    defined = f"{module}.{found.__qualname__}"
    if not is_torchs and not _is_below(defined, names):
        raise ConfigError(place, f"names {path}, which is {defined}, {_outside(names)}")


def _is_below(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _is_import_path(text: str) -> bool:
    """Whether an object could be imported by this text. Imports nothing."""
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return False
    try:
        return importlib.util.find_spec(parts[0]) is not None
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        return True


def _find(place: str, path: str) -> Any:
    """Import the object at a path as jsonargparse does: in a module, or in a class in a module."""
    module_path, _, name = path.rpartition(".")
    try:
        try:
            parent: Any = importlib.import_module(module_path)
        except ModuleNotFoundError:
            outer, _, inner = module_path.rpartition(".")
            if not outer:
                raise
            parent = getattr(importlib.import_module(outer), inner)
        return getattr(parent, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(place, f"cannot import {path}: {error}") from error


def _members(hint: Any) -> Iterator[Any]:
    """The alternatives of a union, without `Annotated`; a hint that is no union is its only one."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        for each in get_args(hint):
            yield from _members(each)
    elif origin is Annotated:
        yield from _members(get_args(hint)[0])
    else:
        yield hint


def _asks_for_class(member: Any) -> bool:
    """Whether a class or function may be named where a value of this type is expected."""
    origin = get_origin(member)
    if origin in (type, collections.abc.Callable) or member is type:
        return True
    found = member if origin is None else origin
    return inspect.isclass(found) and found.__module__.partition(".")[0] not in _PLAIN_MODULES


def _is_mapping(member: Any) -> bool:
    found = get_origin(member) or member
    return inspect.isclass(found) and issubclass(found, collections.abc.Mapping)


def _items_of(members: Sequence[Any]) -> Any:
    """The annotation of the items of lists and the values of mappings; `Any` where there is none."""
    found: list[Any] = []
    for member in members:
        origin, arguments = get_origin(member), get_args(member)
        if inspect.isclass(origin) and issubclass(origin, collections.abc.Iterable) and arguments:
            values = arguments[-1:] if _is_mapping(member) else arguments
            found += [each for each in values if each is not Ellipsis]
    return Union[tuple(found)] if found else Any  # noqa: UP007 (as many as there are)
