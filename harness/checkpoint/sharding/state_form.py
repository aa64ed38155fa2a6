"""Split the optimizer's state of one parameter into leaves, named by path, and a form from which it is rebuilt.

Most optimizers keep a dict of tensors and numbers. Some keep lists, tuples, deques and dicts of these, or objects with
``state_dict`` and ``load_state_dict``. Each tensor or number is a leaf, named by its path (``GG.0``). The form holds
the rest: the containers, their order, None, text, and which leaves are plain numbers.

A form is JSON:

    "tensor"                     a tensor
    "device_tensor"              a tensor of one element on the accelerator
    "made"                       a tensor that only the optimizer can create
    {"order": [1, 0]}            a tensor in an unexpected memory layout: its dimensions, outermost first; the layout
                                 affects the rounding of later steps
    "int", "float", "bool"       a plain number
    null, [...]                  None, a list
    {"tuple": [...]}, {"dict": [[key, form], ...]}, {"object": <form of its state_dict()>}, ...
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Path = tuple[Any, ...]
Form = Any

_TENSORS = ("tensor", "device_tensor", "made")
_NUMBERS: dict[str, type] = {"bool": bool, "int": int, "float": float}
_SEQUENCES: dict[type, str] = {tuple: "tuple", torch.Size: "size"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict"}
_MADE_OF = {name: made for made, name in (*_SEQUENCES.items(), *_MAPPINGS.items())}


class Leaf(NamedTuple):
    """Describe one tensor or number of a state.

    Args:
        name: its path, joined with dots.
        holder: container in which each save looks up `key`.
        key: key or path in `holder`.
        value: the current tensor or number.
        is_made: whether an object's `state_dict` returns it, possibly a new one at each call.
    """

    name: str
    holder: Any
    key: Any
    value: Any
    is_made: bool = False


class Branch:
    """Look up values of a state by path, so that a container may be replaced between saves."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __getitem__(self, path: Path) -> Any:
        """Return the current value at a path. Raises `KeyError`, `IndexError` or `TypeError` if there is none."""
        value = self._values
        for key in path:
            value = (value.state_dict() if is_object(value) else value)[key]
        return value

    def __setitem__(self, path: Path, value: Any) -> None:
        """Replace the value at a path. A tuple is replaced as a whole."""
        above, key = path[:-1], path[-1]
        container = self[above]
        if isinstance(container, tuple):
            items = list(container)
            items[key] = value
            self[above] = type(container)(items)
        else:
            container[key] = value


def is_leaf(value: Any) -> bool:
    """Return whether a value is a tensor or a plain number."""
    return isinstance(value, (Tensor, int, float))


def is_object(value: Any) -> bool:
    """Return whether a value is an object with `state_dict` and `load_state_dict`."""
    return not isinstance(value, (Tensor, type)) and all(
        callable(getattr(value, method, None)) for method in ("state_dict", "load_state_dict")
    )


def leaves_of(values: Mapping[Any, Any]) -> Iterator[Leaf]:
    """Yield the leaves of a state, in its order. None, text and values of unsupported types are skipped."""
    branch = Branch(values)
    for kind, value in values.items():
        if is_leaf(value):
            yield Leaf(str(kind), values, kind, value)
        else:
            for path, leaf, is_made in _walk(value, (kind,), is_made=False):
                yield Leaf(".".join(map(str, path)), branch, path, leaf, is_made)


def _walk(value: Any, path: Path, *, is_made: bool) -> Iterator[tuple[Path, Any, bool]]:
    if is_leaf(value):
        yield path, value, is_made
    elif is_object(value):
        yield from _walk(value.state_dict(), path, is_made=True)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, key), is_made=is_made)
    elif isinstance(value, (list, tuple, deque)):
        for index, item in enumerate(value):
            yield from _walk(item, (*path, index), is_made=is_made)


def form_of(value: Any, like: Tensor, *, in_object: bool = False) -> Form:
    """Return the form of a state or of a value in it.

    Args:
        value: the state, or a part of it.
        like: the parameter, which determines the expected memory layout.
        in_object: whether an object's `state_dict` returned it.

    Raises:
        TypeError: if `value` has an unsupported type.
    """
    if isinstance(value, Tensor):
        return _tensor_form(value, like)
    if value is None:
        return None
    if isinstance(value, str):
        return {"str": value}
    for name, number in _NUMBERS.items():
        if isinstance(value, number):
            return name
    kind = type(value)
    if kind in _MAPPINGS:
        for key in value:
            if isinstance(key, bool) or not isinstance(key, (str, int, float)):
                raise TypeError(f"a dict with the key {key!r}, which is neither text nor a number")
        return {_MAPPINGS[kind]: [[key, form_of(item, like, in_object=in_object)] for key, item in value.items()]}
    if kind is list or kind in _SEQUENCES or kind is deque:
        items = [form_of(item, like, in_object=in_object) for item in value]
        if kind is deque:
            return {"deque": [items, value.maxlen]}
        return items if kind is list else {_SEQUENCES[kind]: items}
    if is_object(value) and not in_object:
        return {"object": form_of(value.state_dict(), like, in_object=True)}
    raise TypeError(f"a {kind.__name__}, not a tensor, a number, a container of these or an object with state_dict()")


def _tensor_form(value: Tensor, like: Tensor) -> Form:
    if isinstance(value, DTensor):
        return "tensor" if value.shape == like.shape else "made"
    if value.numel() == 1:
        return "device_tensor" if value.device.type != "cpu" else "tensor"
    order = _order(value)
    expected = _order(like) if value.shape == like.shape else list(range(value.ndim))
    return "tensor" if order == expected else {"order": order}


def _order(tensor: Tensor) -> list[int]:
    """Return the dimensions in memory order, outermost first; C order if they overlap or have gaps."""
    order = list(range(tensor.ndim))
    if tensor.ndim < 2 or tensor.is_contiguous():
        return order
    strides = tensor.stride()
    found = sorted(order, key=lambda dim: -strides[dim])
    return found if tensor.permute(found).is_contiguous() else order


def needed_form(values: Mapping[Any, Any], like: Tensor) -> Form:
    """Return the form of a whole state, or None if `plain_form` rebuilds it from the names in the file.

    Raises:
        TypeError: as `form_of`.
    """
    form = form_of(dict(values), like)
    has_text_keys = all(isinstance(key, str) for key in values)  # the file has the key 0 as "0"
    is_plain = (
        has_text_keys
        and form == plain_form(values)
        and not any(
            isinstance(value, Tensor) and not value.shape and value.dtype in (torch.int64, torch.float64)
            for value in values.values()
        )
    )
    return None if is_plain else form


def plain_form(kinds: Mapping[Any, Any] | set[str]) -> Form:
    """Return the form of a state that is a dict of tensors, with ``step`` first, as in torch's optimizers."""
    return {"dict": [[kind, "tensor"] for kind in sorted(kinds, key=lambda kind: (kind != "step", str(kind)))]}


def build(form: Form, leaf: Callable[[Path, Form], Any], path: Path = ()) -> Any:
    """Build the value at `path` from a form that `checked` returned; `leaf` creates each tensor or number.

    An object is replaced by the state for its `load_state_dict`.
    """
    if form is None:
        return None
    if isinstance(form, str) or (isinstance(form, dict) and "order" in form):
        return leaf(path, form)
    if isinstance(form, list):
        return [build(item, leaf, (*path, index)) for index, item in enumerate(form)]
    ((name, content),) = form.items()
    if name == "str":
        return content
    if name == "object":
        return build(content, leaf, path)
    if name == "deque":
        items, maxlen = content
        return deque(build(items, leaf, path), maxlen)
    if name in _SEQUENCES.values():
        return _MADE_OF[name](build(content, leaf, path))
    return _MADE_OF[name]((key, build(item, leaf, (*path, key))) for key, item in content)


def objects_in(form: Form, path: Path = ()) -> Iterator[Path]:
    """Yield the paths of values that only the optimizer can create: objects, and tensors with their own sharding."""
    if form == "made":
        yield path
    elif isinstance(form, list):
        for index, item in enumerate(form):
            yield from objects_in(item, (*path, index))
    elif isinstance(form, dict):
        ((name, content),) = form.items()
        if name == "object":
            yield path
        elif name == "deque":
            yield from objects_in(content[0], path)
        elif name in _SEQUENCES.values():
            yield from objects_in(content, path)
        elif name in _MAPPINGS.values():
            for key, item in content:
                yield from objects_in(item, (*path, key))


def checked(form: Any) -> Form:
    """Validate a form and return it. Raises `ValueError` if it is invalid."""
    if form is None or (isinstance(form, str) and (form in _TENSORS or form in _NUMBERS)):
        return form
    if isinstance(form, list):
        return [checked(item) for item in form]
    if isinstance(form, dict) and len(form) == 1:
        ((name, content),) = form.items()
        if name == "str" and isinstance(content, str):
            return form
        if name == "order" and isinstance(content, list) and all(type(dim) is int for dim in content):
            is_order = sorted(content) == list(range(len(content)))
            return form if is_order else _refuse(form)
        if name == "object":
            return {name: checked(content)}
        if name == "tuple" and isinstance(content, list):
            return {name: checked(content)}
        if name == "size" and isinstance(content, list) and all(item == "int" for item in content):
            return form
        if name == "deque" and _is_deque(content):
            return {name: [checked(content[0]), content[1]]}
        if name in _MAPPINGS.values() and _are_items(content):
            return {name: [[key, checked(item)] for key, item in content]}
    return _refuse(form)


def _refuse(form: Any) -> NoReturn:
    raise ValueError(f"not the form of an optimizer's state: {str(form)[:200]}")


def _is_deque(content: Any) -> bool:
    if not isinstance(content, list) or len(content) != 2 or not isinstance(content[0], list):
        return False
    items, maxlen = content
    return maxlen is None or (type(maxlen) is int and maxlen >= len(items))


def _are_items(content: Any) -> bool:
    if not isinstance(content, list):
        return False
    if not all(isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int, float) for item in content):
        return False
    return len({key for key, _ in content}) == len(content)
