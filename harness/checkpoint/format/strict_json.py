"""JSON from a disk that may have damaged it: what is doubtful is refused, and nothing else than `ValueError` comes.

Python's parser takes more than JSON is: numbers that are none, one key twice, UTF-16, half a surrogate pair.
A reader that takes them gives what nobody wrote. Importing this never imports torch.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash


def read(path: Path, limit_bytes: int) -> Any:
    """The value that a file holds.

    Effects: not collective; any thread; blocks for reading; nothing on disk.

    Args:
        path: of the file.
        limit_bytes: a file that is larger is not read.

    Raises:
        OSError: if it cannot be opened or read.
        ValueError: if it is no file, is too large, or holds anything but strict JSON.
    """
    return parse(read_bytes(path, limit_bytes))


def read_bytes(path: Path, limit_bytes: int) -> bytes:
    """The bytes of a file, as `read` has it."""
    found = os.stat(path)
    # To open a pipe would wait for whoever writes into it.
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("is not a file")
    if found.st_size > limit_bytes:
        raise ValueError(f"has {found.st_size:,} bytes, more than the {limit_bytes:,} that it may have")
    try:
        return path.read_bytes()
    except MemoryError as error:
        raise ValueError(f"has {found.st_size:,} bytes, for which there is no memory") from error


def parse(data: bytes) -> Any:
    """The value of strict JSON.

    Raises:
        ValueError: if it is anything else, or nested more deeply than the parser can follow.
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_number)
        if "\\ud" in text or "\\uD" in text:
            # Of a surrogate pair the parser takes one half as well, and whoever prints that, fails.
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except MemoryError as error:
        raise ValueError("needs more memory than there is") from error
    return value


def checksum(value: Any) -> str:
    """XXH3-128 in hex of a JSON value, however it is indented and its keys are ordered.

    Raises:
        ValueError: if it holds a number that JSON has not, or a circle.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


def is_count(value: Any) -> bool:
    """Whether it is a whole number from zero on; true and false are none."""
    return type(value) is int and value >= 0


def is_number(value: Any) -> bool:
    """Whether it is a number; true and false are none."""
    return type(value) in (int, float)


def is_texts(value: Any) -> bool:
    """Whether it is an object that holds texts alone."""
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"has the key {twice!r} twice")
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"has {text}, which is no number in JSON")


def _number(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"has {text}, which no number of 64 bits is")
    return value
