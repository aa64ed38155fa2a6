"""Build an object from a description that another person may have written: a class, and JSON values as its arguments.

Each value is read together with the annotation of its parameter, and becomes only what both name:

    annotation                      value                                             result
    a class                         {class_path, init_args}, an import path           an object of it
    a class, such as a dataclass    its arguments                                     an object of it
    ``type[...]``, ``Callable``     an import path                                    the class or function
    a container                     a list or a mapping                               the container, item by item
    text, a number, a path, ...     a scalar                                          converted to the type
    ``Any``, or no annotation       a list, a mapping, a scalar                       the same

All else is an error. So an import path has a meaning only where the code of the model asks for a class or a function;
`harness.trusted_classes` decides which ones it may name, and `annotations` reads the annotations. jsonargparse
alone would also take class names from dotted keys, ``dict_kwargs``, names without a module, text that holds YAML or
JSON, and files. Here it converts scalars only.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import functools
import importlib.util
import inspect
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from harness.errors import ConfigError
from harness.models.annotations import (
    alternatives,
    asks_for_class,
    convert,
    default_of,
    describe,
    is_class,
    is_scalar,
    is_subtype,
    name_of,
    origin_of,
    parameters_of,
    parse_text,
)
from harness.models.trusted_classes import TrustedClasses, is_full_path

_SEQUENCES: Mapping[Any, Any] = {
    **dict.fromkeys((list, collections.abc.Sequence, collections.abc.MutableSequence), list),
    **dict.fromkeys((collections.abc.Iterable, collections.abc.Collection), list),
    **dict.fromkeys((set, collections.abc.Set, collections.abc.MutableSet), set),
    **{each: each for each in (tuple, frozenset, collections.deque)},
}
_MAPPINGS: Mapping[Any, Any] = {
    **dict.fromkeys((dict, collections.abc.Mapping, collections.abc.MutableMapping), dict),
    collections.OrderedDict: collections.OrderedDict,
}


class DescribedModel:
    """Builds a model, and what its arguments describe.

    Args:
        classes: what the arguments may name.
    """

    def __init__(self, classes: TrustedClasses) -> None:
        self._classes = classes

    def build(self, place: str, found: type[Any], init_args: Any) -> Any:
        """Make an object of a class.

        Effects: imports the classes and functions that the arguments name, and calls the constructors.

        Args:
            place: of `init_args`, for messages.
            found: the class.
            init_args: name -> JSON value.

        Raises:
            ConfigError: with the place of what may not be named, is unknown or of a wrong type, or is refused by the
                constructor.
        """
        return self._object(place, found, init_args, None)

    def _object(self, place: str, found: type[Any], init_args: Any, default: Any) -> Any:
        """Make an object; of a dataclass that is the parameter's default, all that is not given is from there."""
        is_changed = dataclasses.is_dataclass(default) and type(default) is found
        arguments = self._arguments(place, found, init_args, default if is_changed else None)
        try:
            return dataclasses.replace(default, **arguments) if is_changed else found(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(place, f"{name_of(found)} refuses them: {error}") from error

    def _arguments(self, place: str, found: type[Any], init_args: Any, default: Any = None) -> dict[str, Any]:
        if not isinstance(init_args, Mapping):
            raise ConfigError(place, f"must be a mapping, got {init_args!r}")
        parameters, arguments = parameters_of(found), {}
        for name, value in init_args.items():
            if name not in parameters:
                known = ", ".join(parameters) or "none"
                raise ConfigError(f"{place}.{name}", f"is not an argument of {name_of(found)}; it takes {known}")
            hint, declared = parameters[name]
            base = default_of(found, name, declared) if default is None else getattr(default, name, declared)
            arguments[name] = self._value(f"{place}.{name}", hint, value, base)
        return arguments

    def _value(self, place: str, hint: Any, value: Any, default: Any = None) -> Any:
        members = list(alternatives(hint))
        if isinstance(value, str) and any(member not in (str, types.NoneType) for member in members):
            # As in training, where jsonargparse reads a text as YAML if another type than text is expected.
            loaded = parse_text(value)
            value = loaded if isinstance(loaded, (Mapping, list)) else value
        if isinstance(value, Mapping):
            return self._mapping(place, members, value, default)
        if isinstance(value, (list, tuple)):
            return self._sequence(place, members, value)
        if isinstance(value, str) and any(map(asks_for_class, members)):
            return self._text(place, members, value)
        return convert(place, members, value)

    def _text(self, place: str, members: Sequence[Any], text: str) -> Any:
        is_text_too = any(is_scalar(member) and member is not types.NoneType for member in members) or Any in members
        # As in training, where the types of a union are tried in their order, and each text is a `str`.
        is_text_first = str in members and members.index(str) < members.index(next(filter(asks_for_class, members)))
        if is_text_first or (is_text_too and not _is_importable(text)):
            return convert(place, members, text)
        found = self._classes.find(place, text)
        return self._made(place, members, text, found, None)

    def _mapping(self, place: str, members: Sequence[Any], value: Mapping[Any, Any], default: Any) -> Any:
        if "class_path" in value:
            return self._instance(place, members, value)
        classes = [member for member in members if is_class(member)]
        for member in classes:
            # Without class_path: the arguments of the class that the annotation names.
            if value.keys() <= parameters_of(origin_of(member)).keys():
                return self._object(place, origin_of(member), value, default)
        for member in members:
            if typing.is_typeddict(origin_of(member)):
                return self._typed_dict(place, origin_of(member), value)
            if origin_of(member) in _MAPPINGS:
                if not get_args(member):
                    return _MAPPINGS[origin_of(member)](_plain(place, value))
                key_hint, item_hint = get_args(member)
                keys = [int(key) if key_hint is int and str(key).isdecimal() else key for key in value]
                items = [self._value(f"{place}.{key}", item_hint, item) for key, item in value.items()]
                return _MAPPINGS[origin_of(member)](zip(keys, items, strict=True))
        if classes:
            return self.build(place, origin_of(classes[0]), value)
        if Any in members:
            return _plain(place, value)
        raise ConfigError(place, f"must be {describe(members)}, got a mapping")

    def _instance(self, place: str, members: Sequence[Any], value: Mapping[Any, Any]) -> Any:
        path = value["class_path"]
        if not isinstance(path, str) or not any(map(asks_for_class, members)):
            raise _not_asked(place, path)
        if unknown := [str(key) for key in value if key not in ("class_path", "init_args")]:
            raise ConfigError(place, f"may have class_path and init_args alone, and has {', '.join(unknown)}")
        found = self._classes.find(place, path)
        return self._made(place, members, path, found, value.get("init_args", {}))

    def _made(self, place: str, members: Sequence[Any], path: str, found: Any, init_args: Any) -> Any:
        """What an annotation asks for, of the class or function that is found; `init_args` is None for a text."""
        arguments_place, arguments = f"{place}.init_args", {} if init_args is None else init_args
        for member in filter(asks_for_class, members):
            origin, hints = origin_of(member), get_args(member)
            if origin is type:
                if init_args is None and inspect.isclass(found) and is_subtype(found, hints[0] if hints else Any):
                    return found
            elif origin is collections.abc.Callable or getattr(origin, "_is_protocol", False):
                if not inspect.isclass(found):
                    if init_args is None and callable(found):
                        return found
                elif hints and inspect.isclass(hints[-1]) and issubclass(found, hints[-1]):
                    return functools.partial(found, **self._arguments(arguments_place, found, arguments))
                elif any("__call__" in vars(each) for each in found.__mro__):
                    return self.build(arguments_place, found, arguments)
            elif inspect.isclass(found) and issubclass(found, origin):
                return self.build(arguments_place, found, arguments)
            elif init_args is None and isinstance(found, origin):
                return found
        raise ConfigError(place, f"must be {describe(members)}, and {path} is not")

    def _typed_dict(self, place: str, member: Any, value: Mapping[Any, Any]) -> dict[str, Any]:
        hints = typing.get_type_hints(member)
        if unknown := [str(key) for key in value if key not in hints]:
            raise ConfigError(place, f"has {', '.join(unknown)}; it takes {', '.join(hints)}")
        return {key: self._value(f"{place}.{key}", hints[key], item) for key, item in value.items()}

    def _sequence(self, place: str, members: Sequence[Any], value: Sequence[Any]) -> Any:
        errors = []
        for member in members:
            origin, hints = origin_of(member), get_args(member)
            try:
                if inspect.isclass(origin) and issubclass(origin, tuple) and hasattr(origin, "_fields"):
                    return self.build(place, origin, dict(zip(origin._fields, value, strict=False)))
                if member is Any or origin in _SEQUENCES:
                    return _SEQUENCES.get(origin, list)(self._items(place, origin, hints, value))
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if errors else ConfigError(place, f"must be {describe(members)}, got a list")

    def _items(self, place: str, origin: Any, hints: Sequence[Any], value: Sequence[Any]) -> list[Any]:
        if not hints:
            return [_plain(f"{place}[{index}]", item) for index, item in enumerate(value)]
        each_hint: Sequence[Any] = [hints[0]] * len(value)
        if origin is tuple and hints[-1] is not Ellipsis:
            if len(hints) != len(value):
                raise ConfigError(place, f"must have {len(hints)} items, got {len(value)}")
            each_hint = hints
        pairs = zip(each_hint, value, strict=True)
        return [self._value(f"{place}[{index}]", hint, item) for index, (hint, item) in enumerate(pairs)]


def _plain(place: str, value: Any) -> Any:
    """A value of no type, as it is; at no depth a class."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise _not_asked(place, value["class_path"])
        return {key: _plain(f"{place}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{place}[{index}]", item) for index, item in enumerate(value)]
    return value


def _not_asked(place: str, path: Any) -> ConfigError:
    return ConfigError(place, f"names the class {path!r}, but the constructor asks for no class there")


def _is_importable(text: str) -> bool:
    """Whether an object could be imported by this text. Imports nothing."""
    if not is_full_path(text):
        return False
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        return True
