"""Convert logged values to numbers and steps that JSON and MLflow can represent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

_INT64 = range(-(2**63), 2**63)


class LoggedValues:
    """Convert logged values, and warn once through `say` for each name that is left out.

    Effects: not collective; main thread; waits for a value that is on a device; nothing on disk.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said: set[str] = set()

    def numbers(self, values: Mapping[Any, Any]) -> dict[str, float]:
        """Return name -> number, without the values that are not numbers."""
        numbers: dict[str, float] = {}
        for key, value in values.items():
            name = as_name(key)
            if (number := self.number(name, value)) is not None:
                numbers[name] = number
        return numbers

    def number(self, name: str, value: Any) -> float | None:
        """Return the value as a float, or None if it is not a number."""
        if type(value) is float:
            return value
        if (number := as_number(value)) is None:
            self._say_once(name, f"{name} is left out: {_reason(value)}")
        return number

    def step(self, value: Any) -> int | None:
        """Return a step as a 64-bit integer; None if it is None or cannot be converted."""
        if value is None or (type(value) is int and value in _INT64):
            return value
        step, is_exact = _step(value)
        if step is None:
            shown = as_text(value, repr)
            self._say_once(
                "a step", f"a step is {shown:.80}, no integer of 64 bits; such values are logged at the current step"
            )
        elif not is_exact:
            shown = as_text(value, repr)
            self._say_once("a fraction", f"a step is {shown:.80}; fractions of steps are cut off, as in {step}")
        return step

    def _say_once(self, key: str, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._say(line)


def as_name(key: Any) -> str:
    """Return a metric's name as text that can be encoded as UTF-8."""
    return as_text(key).encode(errors="replace").decode()


def as_text(value: Any, convert: Callable[[Any], str] = str) -> str:
    """Return a value as text, or its type if the conversion fails (an int of more than 4,300 digits)."""
    try:
        return convert(value)
    except Exception:
        size = f" of {value.bit_length()} bits" if isinstance(value, int) else ""
        return f"({type(value).__name__}{size})"


def as_number(value: Any) -> float | None:
    """Return the value of a number, a numeric text, or an array or tensor of one element; otherwise None."""
    try:
        value = _scalar(value)
        return None if isinstance(value, complex) else float(value)
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _scalar(value: Any) -> Any:
    """Return an array or tensor of one element as a number, and any other value unchanged."""
    if isinstance(value, torch.Tensor):
        return value.item()
    return value.item() if getattr(value, "size", None) == 1 else value


def _step(value: Any) -> tuple[int | None, bool]:
    """Return a step as an integer (None if impossible), and whether the conversion is exact."""
    try:
        value = _scalar(value)
        if isinstance(value, str):
            value = float(value) if "." in value else int(value)
        step = int(value)
        return (step if step in _INT64 else None), step == value
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        return None, False


def _reason(value: Any) -> str:
    if isinstance(value, int):
        return f"an int of {value.bit_length()} bits is more than a float holds"
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}") + " is no number"
