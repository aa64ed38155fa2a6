"""Build an object from an untrusted description: a class, and JSON values as its arguments.

The annotation of a parameter decides how its value is converted:

    annotation                      value                                             result
    a class                         {class_path, init_args}, an import path           an object of it
    a class, such as a dataclass    its arguments                                     an object of it
    ``type[...]``, ``Callable``     an import path                                    the class or function
    a container                     a list or a mapping                               the container, item by item
    text, a number, a path, ...     a scalar                                          converted to the type
    ``Any``, or no annotation       a list, a mapping, a scalar                       unchanged

Any other combination is an error. An import path therefore names a class only where the model's constructor expects
one, and `trusted_classes` checks the name. jsonargparse converts only scalars: for other types it would also read class
names from dotted keys, ``dict_kwargs``, names without a module, text with YAML or JSON, and files.
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
    accepts_class,
    alternatives,
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
    """Builds a model and the objects that its arguments describe, from the classes that the arguments may name."""

    def __init__(self, classes: TrustedClasses) -> None:
        self._classes = classes

    def build(self, place: str, found: type[Any], init_args: Any) -> Any:
        """Construct an object from its class and arguments (name -> JSON value); `place` is for messages.

        Effects: imports the classes and functions that the arguments name, and calls the constructors.

        Raises:
            ConfigError: if an argument is unknown, has a wrong type, names a class that is not allowed, or is rejected.
        """
        return self._object(place, found, init_args, None)

    def _object(self, place: str, found: type[Any], init_args: Any, default: Any) -> Any:
        """Construct an object. The parameter's default supplies missing fields of a dataclass."""
        is_changed = dataclasses.is_dataclass(default) and type(default) is found
        arguments = self._arguments(place, found, init_args, default if is_changed else None)
        try:
            return dataclasses.replace(default, **arguments) if is_changed else found(**arguments)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(place, f"{name_of(found)} rejects them: {error}") from error

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
            # As in training, text is parsed as YAML if a type other than text is allowed.
            loaded = parse_text(value)
            value = loaded if isinstance(loaded, (Mapping, list)) else value
        if isinstance(value, Mapping):
            return self._mapping(place, members, value, default)
        if isinstance(value, (list, tuple)):
            return self._sequence(place, members, value)
        if isinstance(value, str) and any(map(accepts_class, members)):
            return self._text(place, members, value)
        return convert(place, members, value)

    def _text(self, place: str, members: Sequence[Any], text: str) -> Any:
        is_text_too = any(is_scalar(member) and member is not types.NoneType for member in members) or Any in members
        # As in training, the types of a union are tried in order, and `str` accepts any text.
        is_text_first = str in members and members.index(str) < members.index(next(filter(accepts_class, members)))
        if is_text_first or (is_text_too and not _is_importable(text)):
            return convert(place, members, text)
        found = self._classes.find(place, text)
        return self._resolve(place, members, text, found, None)

    def _mapping(self, place: str, members: Sequence[Any], value: Mapping[Any, Any], default: Any) -> Any:
        if "class_path" in value:
            return self._instance(place, members, value)
        classes = [member for member in members if is_class(member)]
        for member in classes:
            # Without class_path these are arguments of the annotated class.
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
        if not isinstance(path, str) or not any(map(accepts_class, members)):
            raise _unexpected_class(place, path)
        if unknown := [str(key) for key in value if key not in ("class_path", "init_args")]:
            raise ConfigError(place, f"may have only class_path and init_args, and has {', '.join(unknown)}")
        found = self._classes.find(place, path)
        return self._resolve(place, members, path, found, value.get("init_args", {}))

    def _resolve(self, place: str, members: Sequence[Any], path: str, found: Any, init_args: Any) -> Any:
        """Return the class or function, or an object of it; `init_args` is None if the value is only an import path."""
        arguments_place, arguments = f"{place}.init_args", {} if init_args is None else init_args
        for member in filter(accepts_class, members):
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
    """Return an untyped value unchanged; refuse a class at any depth."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            raise _unexpected_class(place, value["class_path"])
        return {key: _plain(f"{place}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(f"{place}[{index}]", item) for index, item in enumerate(value)]
    return value


def _unexpected_class(place: str, path: Any) -> ConfigError:
    return ConfigError(place, f"names the class {path!r}, but the constructor expects no class there")


def _is_importable(text: str) -> bool:
    """Whether text is an import path below an existing package; imports nothing."""
    if not is_full_path(text):
        return False
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a module without a spec, such as __main__
        return True
