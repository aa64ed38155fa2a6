"""Read the annotations of a constructor, and convert scalar values to them, for `harness.models.described_model`.

No function here imports what a value names. jsonargparse converts scalars as in training, but only to the types that
`is_scalar` accepts, for which it imports nothing.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import decimal
import enum
import inspect
import os
import pathlib
import sys
import types
import typing
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader
from jsonargparse._parameter_resolvers import get_signature_parameters
from jsonargparse.typing import get_registered_type

from harness.errors import ConfigError

_SCALARS = (
    *(str, int, float, bool, complex, bytes, bytearray, range, types.NoneType),
    *(decimal.Decimal, uuid.UUID, datetime.timedelta, os.PathLike),
)
_NOT_BY_NAME = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def parameters_of(found: type[Any]) -> dict[str, tuple[Any, Any]]:
    """Return each parameter's annotation and default, including those that the constructor passes to its parents."""
    hints: dict[str, tuple[Any, Any]] = {}
    try:
        parameters = get_signature_parameters(found, logger=False)
    except ValueError:  # a class in C has no signature
        return {}
    for each in parameters:
        if each.kind in _NOT_BY_NAME:
            continue
        hint, default = each.annotation, each.default
        if hint is inspect.Parameter.empty:
            # As in jsonargparse: text stays text if the default is text.
            hint = (type(default), Any) if type(default) in _SCALARS else Any
        hints[each.name] = ((hint, None) if default is None else hint, default)
    return hints


def default_of(found: type[Any], name: str, declared: Any) -> Any:
    """Return a parameter's default, from its factory if it is a field of a dataclass."""
    for field in dataclasses.fields(found) if dataclasses.is_dataclass(found) else ():
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return declared


def alternatives(hint: Any) -> Iterator[Any]:
    """Yield the members of a union or a tuple, with aliases resolved; for any other hint, the hint itself."""
    origin = get_origin(hint)
    meaning = getattr(hint, "__supertype__", getattr(hint, "__value__", None))  # of NewType, and of ``type X = ...``
    if isinstance(hint, tuple) or origin in (Union, types.UnionType):
        for each in hint if isinstance(hint, tuple) else get_args(hint):
            yield from alternatives(each)
    elif origin is Annotated:
        yield from alternatives(get_args(hint)[0])
    elif hint is None:
        yield types.NoneType
    elif inspect.isclass(hint) or origin is not None:
        yield Any if hint is object else hint
    else:  # a type variable, an unresolved name, or not a type
        yield from alternatives(meaning) if meaning is not None else (Any,)


def origin_of(member: Any) -> Any:
    """Return the type without its parameters: ``list`` for ``list[int]``."""
    return get_origin(member) or member


def is_scalar(member: Any) -> bool:
    """Whether `convert` converts to this type without importing anything.

    For any other class, including subclasses of the scalar types and types such as `datetime.datetime`, jsonargparse
    reads text as the import path of a subclass, and imports it.
    """
    origin = origin_of(member)
    if origin in _SCALARS or origin is Literal:
        return True
    if not inspect.isclass(origin):
        return False
    is_of_jsonargparse = origin.__module__ == "jsonargparse.typing" and get_registered_type(origin) is not None
    return is_of_jsonargparse or issubclass(origin, (enum.Enum, pathlib.PurePath))


def is_class(member: Any) -> bool:
    """Whether the type is a class whose objects may be built; classes of the standard library are excluded."""
    origin = origin_of(member)
    if not inspect.isclass(origin) or is_scalar(member) or typing.is_typeddict(origin):
        return False
    return origin.__module__.partition(".")[0] not in sys.stdlib_module_names


def accepts_class(member: Any) -> bool:
    """Whether a value of this type may name a class or a function."""
    return origin_of(member) in (type, collections.abc.Callable) or is_class(member)


def is_subtype(found: type[Any], bound: Any) -> bool:
    """Whether ``type[bound]`` accepts a class."""
    allowed = [origin_of(member) for member in alternatives(bound)]
    return Any in allowed or any(inspect.isclass(each) and issubclass(found, each) for each in allowed)


def convert(place: str, members: Sequence[Any], value: Any) -> Any:
    """Convert a scalar (neither list nor mapping) to the first of several types (`alternatives`) that accepts it.

    Raises:
        ConfigError: if no type accepts the value; `place` is where it is.
    """
    # As in training, YAML's spellings of null mean None for an optional parameter.
    if types.NoneType in members and (parse_text(value) if isinstance(value, str) else value) is None:
        return None
    for member in filter(is_scalar, members):
        with suppress(ArgumentError, ValueError, TypeError, ArithmeticError, NotImplementedError):
            return _converted(member, value)
    if any(_is_instance(value, member) for member in members):
        return value
    if Any in members:
        loaded = parse_text(value) if isinstance(value, str) else value
        return loaded if isinstance(loaded, (int, float, types.NoneType)) else value
    raise ConfigError(place, f"must be {describe(members)}, got {value!r}")


def _converted(member: Any, value: Any) -> Any:
    """Convert a value to a scalar type; every error it raises is suppressed by `convert`."""
    origin = origin_of(member)
    if inspect.isclass(origin) and issubclass(origin, pathlib.PurePath):
        if isinstance(value, str):
            return origin(value)
        raise TypeError(f"{name_of(origin)} needs text")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=member)
    return parser.parse_object({"value": value}).value


def _is_instance(value: Any, member: Any) -> bool:
    try:
        return not is_scalar(member) and isinstance(value, origin_of(member))
    except TypeError:  # Any, or a protocol
        return False


def parse_text(text: str) -> Any:
    """Parse text as jsonargparse does for a parameter of any type; return text that is not YAML unchanged."""
    try:
        return get_loader("yaml")(text) if text.strip() else text
    except (yaml.YAMLError, ValueError):
        return text


def describe(members: Sequence[Any]) -> str:
    """Join the names of several types for a message."""
    return " or ".join(dict.fromkeys(name_of(member) for member in members))


def name_of(found: Any) -> str:
    """Return the full name of a type for a message."""
    if found is types.NoneType or get_origin(found) is not None or not inspect.isclass(found):
        return "None" if found is types.NoneType else str(found)
    return found.__qualname__ if found.__module__ == "builtins" else f"{found.__module__}.{found.__qualname__}"
