"""Build an object from a description that another person may have written: a class, and JSON values as its arguments.

Each value is read together with the annotation of its parameter, and becomes only what both name:

    annotation                      value                                             result
    a class                         {class_path, init_args}, an import path           an object of it
    a class, such as a dataclass    its arguments                                     an object of it
    ``type[...]``, ``Callable``     an import path                                    the class or function
    a container                     a list or a mapping                               the container, item by item
    text, a number, an enum, ...    a scalar                                          jsonargparse converts it
    ``Any``, or none                a list, a mapping, a scalar                       the same

All else is an error. So an import path has a meaning only where the code of the model asks for a class or a function;
`harness.trusted_classes` decides which ones it may name. jsonargparse alone would also take class names from dotted
keys, ``dict_kwargs``, names without a module, text that holds YAML or JSON, and files: it never sees more than a scalar
here, and types that are no classes of anybody's.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import datetime
import decimal
import enum
import functools
import importlib.util
import inspect
import os
import pathlib
import sys
import types
import typing
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse.typing import get_registered_type

from harness.errors import ConfigError
from harness.trusted_classes import TrustedClasses, is_full_path

_SCALARS = (
    *(str, int, float, bool, complex, bytes, bytearray, range, types.NoneType),
    *(decimal.Decimal, uuid.UUID, datetime.timedelta, os.PathLike),
)
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
_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


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
            raise ConfigError(place, f"{_name(found)} refuses them: {error}") from error

    def _arguments(self, place: str, found: type[Any], init_args: Any, default: Any = None) -> dict[str, Any]:
        if not isinstance(init_args, Mapping):
            raise ConfigError(place, f"must be a mapping, got {init_args!r}")
        parameters, arguments = _parameters(found), {}
        for name, value in init_args.items():
            if name not in parameters:
                known = ", ".join(parameters) or "none"
                raise ConfigError(f"{place}.{name}", f"is not an argument of {_name(found)}; it takes {known}")
            hint, declared = parameters[name]
            base = _made_default(found, name, declared) if default is None else getattr(default, name, declared)
            arguments[name] = self._value(f"{place}.{name}", hint, value, base)
        return arguments

    def _value(self, place: str, hint: Any, value: Any, default: Any = None) -> Any:
        members = list(_members(hint))
        if isinstance(value, str) and any(member not in (str, types.NoneType) for member in members):
            # As in training, where jsonargparse reads a text as YAML if another type than text is expected.
            loaded = _loaded(value)
            value = loaded if isinstance(loaded, (Mapping, list)) else value
        if isinstance(value, Mapping):
            return self._mapping(place, members, value, default)
        if isinstance(value, (list, tuple)):
            return self._sequence(place, members, value)
        if isinstance(value, str) and any(map(_asks_for_class, members)):
            return self._text(place, members, value)
        return _scalar(place, members, value)

    def _text(self, place: str, members: Sequence[Any], text: str) -> Any:
        is_text_too = any(_is_scalar(member) and member is not types.NoneType for member in members) or Any in members
        # As in training, where the types of a union are tried in their order, and each text is a `str`.
        is_text_first = str in members and members.index(str) < members.index(next(filter(_asks_for_class, members)))
        if is_text_first or (is_text_too and not _is_importable(text)):
            return _scalar(place, members, text)
        found = self._classes.find(place, text)
        return self._made(place, members, text, found, None)

    def _mapping(self, place: str, members: Sequence[Any], value: Mapping[Any, Any], default: Any) -> Any:
        if "class_path" in value:
            return self._instance(place, members, value)
        classes = [member for member in members if _is_class(member)]
        for member in classes:
            # Without class_path: the arguments of the class that the annotation names.
            if value.keys() <= _parameters(_origin(member)).keys():
                return self._object(place, _origin(member), value, default)
        for member in members:
            if typing.is_typeddict(_origin(member)):
                return self._typed_dict(place, _origin(member), value)
            if _origin(member) in _MAPPINGS:
                if not get_args(member):
                    return _MAPPINGS[_origin(member)](_plain(place, value))
                key_hint, item_hint = get_args(member)
                keys = [int(key) if key_hint is int and str(key).isdecimal() else key for key in value]
                items = [self._value(f"{place}.{key}", item_hint, item) for key, item in value.items()]
                return _MAPPINGS[_origin(member)](zip(keys, items, strict=True))
        if classes:
            return self.build(place, _origin(classes[0]), value)
        if Any in members:
            return _plain(place, value)
        raise ConfigError(place, f"must be {_described(members)}, got a mapping")

    def _instance(self, place: str, members: Sequence[Any], value: Mapping[Any, Any]) -> Any:
        path = value["class_path"]
        if not isinstance(path, str) or not any(map(_asks_for_class, members)):
            raise _not_asked(place, path)
        if unknown := [str(key) for key in value if key not in ("class_path", "init_args")]:
            raise ConfigError(place, f"may have class_path and init_args alone, and has {', '.join(unknown)}")
        found = self._classes.find(place, path)
        return self._made(place, members, path, found, value.get("init_args", {}))

    def _made(self, place: str, members: Sequence[Any], path: str, found: Any, init_args: Any) -> Any:
        """What an annotation asks for, of the class or function that is found; `init_args` is None for a text."""
        arguments_place, arguments = f"{place}.init_args", {} if init_args is None else init_args
        for member in filter(_asks_for_class, members):
            origin, hints = _origin(member), get_args(member)
            if origin is type:
                if init_args is None and inspect.isclass(found) and _is_of(found, hints[0] if hints else Any):
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
        raise ConfigError(place, f"must be {_described(members)}, and {path} is not")

    def _typed_dict(self, place: str, member: Any, value: Mapping[Any, Any]) -> dict[str, Any]:
        hints = typing.get_type_hints(member)
        if unknown := [str(key) for key in value if key not in hints]:
            raise ConfigError(place, f"has {', '.join(unknown)}; it takes {', '.join(hints)}")
        return {key: self._value(f"{place}.{key}", hints[key], item) for key, item in value.items()}

    def _sequence(self, place: str, members: Sequence[Any], value: Sequence[Any]) -> Any:
        errors = []
        for member in members:
            origin, hints = _origin(member), get_args(member)
            try:
                if inspect.isclass(origin) and issubclass(origin, tuple) and hasattr(origin, "_fields"):
                    return self.build(place, origin, dict(zip(origin._fields, value, strict=False)))
                if member is Any or origin in _SEQUENCES:
                    return _SEQUENCES.get(origin, list)(self._items(place, origin, hints, value))
            except ConfigError as error:
                errors.append(error)
        raise errors[0] if errors else ConfigError(place, f"must be {_described(members)}, got a list")

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


def _parameters(found: type[Any]) -> dict[str, tuple[Any, Any]]:
    """The names that a constructor takes, with annotation and default; of its parents too, where it passes them on."""
    hints: dict[str, tuple[Any, Any]] = {}
    try:
        parameters = get_signature_parameters(found, logger=False)
    except ValueError:  # a class in C, or one of a mapping
        return {}
    for each in parameters:
        if each.kind in _NOT_BY_NAME:
            continue
        hint, default = each.annotation, each.default
        if hint is inspect.Parameter.empty:
            # As jsonargparse does: a text stays one where the default is a text.
            hint = (type(default), Any) if type(default) in _SCALARS else Any
        hints[each.name] = ((hint, None) if default is None else hint, default)
    return hints


def _made_default(found: type[Any], name: str, declared: Any) -> Any:
    """A parameter's default; that of a dataclass's field may have to be made."""
    for field in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return declared


def _members(hint: Any) -> Iterator[Any]:
    """The alternatives of a union (or a tuple), aliases resolved; a hint that is no union is its only one."""
    origin = get_origin(hint)
    meaning = getattr(hint, "__supertype__", getattr(hint, "__value__", None))  # of NewType, and of ``type X = ...``
    if isinstance(hint, tuple) or origin in (Union, types.UnionType):
        for each in hint if isinstance(hint, tuple) else get_args(hint):
            yield from _members(each)
    elif origin is Annotated:
        yield from _members(get_args(hint)[0])
    elif hint is None:
        yield types.NoneType
    elif inspect.isclass(hint) or origin is not None:
        yield Any if hint is object else hint
    else:  # a variable, a name that cannot be resolved, or no type at all
        yield from _members(meaning) if meaning is not None else (Any,)


def _origin(member: Any) -> Any:
    return get_origin(member) or member


def _is_scalar(member: Any) -> bool:
    """Whether values of this type are converted, by us or by jsonargparse, without importing anything.

    For any other class jsonargparse takes a text as the import path of a subclass, and imports it: also for a subclass
    of a type that it converts, and for types such as `datetime.datetime`.
    """
    origin = _origin(member)
    if origin in _SCALARS or origin is Literal:
        return True
    if not inspect.isclass(origin):
        return False
    is_of_jsonargparse = origin.__module__ == "jsonargparse.typing" and get_registered_type(origin) is not None
    return is_of_jsonargparse or issubclass(origin, (enum.Enum, pathlib.PurePath))


def _is_class(member: Any) -> bool:
    """Whether it is a class of which an object is asked for; those of Python's own modules are not."""
    origin = _origin(member)
    if not inspect.isclass(origin) or _is_scalar(member) or typing.is_typeddict(origin):
        return False
    return origin.__module__.partition(".")[0] not in sys.stdlib_module_names


def _asks_for_class(member: Any) -> bool:
    """Whether a class or function may be named where a value of this type is expected."""
    return _origin(member) in (type, collections.abc.Callable) or _is_class(member)


def _is_of(found: type[Any], bound: Any) -> bool:
    allowed = [_origin(member) for member in _members(bound)]
    return Any in allowed or any(inspect.isclass(each) and issubclass(found, each) for each in allowed)


def _scalar(place: str, members: Sequence[Any], value: Any) -> Any:
    if types.NoneType in members and (value is None or value == "null"):  # as jsonargparse reads an optional value
        return None
    for member in filter(_is_scalar, members):
        with suppress(ArgumentError, ValueError, TypeError, ArithmeticError, NotImplementedError):
            return _converted(member, value)
    if any(_is_instance(value, member) for member in members):
        return value
    if Any in members:
        loaded = _loaded(value) if isinstance(value, str) else value
        return loaded if isinstance(loaded, (int, float, types.NoneType)) else value
    raise ConfigError(place, f"must be {_described(members)}, got {value!r}")


def _converted(member: Any, value: Any) -> Any:
    """The value as a member of `_is_scalar`; any of several errors if it is not one."""
    origin = _origin(member)
    if inspect.isclass(origin) and issubclass(origin, pathlib.PurePath):
        if isinstance(value, str):
            return origin(value)
        raise TypeError(f"{_name(origin)} needs a text")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=member)
    return parser.parse_object({"value": value}).value


def _is_instance(value: Any, member: Any) -> bool:
    """Whether it is one already, as a number is of `numbers.Number`."""
    try:
        return not _is_scalar(member) and isinstance(value, _origin(member))
    except TypeError:  # of Any, and of a protocol
        return False


def _loaded(text: str) -> Any:
    """A text as jsonargparse reads it where any type may stand; the text itself if it is no YAML."""
    try:
        return get_loader("yaml")(text) if text.strip() else text
    except (yaml.YAMLError, ValueError):
        return text


def _is_importable(text: str) -> bool:
    """Whether an object could be imported by this text. Imports nothing."""
    if not is_full_path(text):
        return False
    try:
        return importlib.util.find_spec(text.partition(".")[0]) is not None
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        return True


def _described(members: Sequence[Any]) -> str:
    return " or ".join(dict.fromkeys(_name(member) for member in members))


def _name(found: Any) -> str:
    if found is types.NoneType or get_origin(found) is not None or not inspect.isclass(found):
        return "None" if found is types.NoneType else str(found)
    return found.__qualname__ if found.__module__ == "builtins" else f"{found.__module__}.{found.__qualname__}"
