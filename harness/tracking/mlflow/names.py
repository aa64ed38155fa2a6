"""The names that MLflow accepts: of metrics, parameters, tags and registered models, and the paths of artifacts.

MLflow refuses a whole request for one name in it, so that names are made acceptable before they are in the journal.
The rules are those of `mlflow.utils.validation`, which the tests compare them with. They are repeated here because the
trainer does not import mlflow. A name that is accepted stays as it is, and each function keeps its own results: the
publisher applies them again, since a journal of an earlier version holds names as they were given.

A replaced name depends on the given name alone, so it is the same in every attempt, whatever else is logged. It ends in
a digest of the given name, so that `acc@1` and `acc_1` are two metrics.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Final, Literal, TypeVar

import xxhash

MAX_KEY_CHARS: Final = 250
# Of the column in MLflow's database.
MAX_MODEL_NAME_CHARS: Final = 256
# Of a name in most file systems.
_MAX_FILE_NAME_BYTES: Final = 255

_KEY = re.compile(r"[\w\-. :/]+")
_NOT_IN_KEY = re.compile(r"[^\w\-. :/]")
_NOT_IN_MODEL_NAME = re.compile(r"[/:\x00-\x1f\x7f\ud800-\udfff]")
# The server decodes a path (%2e%2e) before it looks whether it leaves the directory.
_NOT_IN_PATH = re.compile(r"[%#?:\\\x00-\x1f\x7f\ud800-\udfff]")

Kind = Literal["metric", "parameter", "tag", "registered model", "text"]
Value = TypeVar("Value")


@lru_cache(maxsize=65536)
def clean_key(name: str) -> str:
    """The name of a metric, parameter or tag; if MLflow refuses it, with that replaced, and a digest at its end."""
    if _KEY.fullmatch(name) and len(name) <= MAX_KEY_CHARS and not _leaves_or_is_not_normal(name):
        return name
    key = "/".join(_clean_part(part) for part in _NOT_IN_KEY.sub("_", name).split("/") if part)
    return _with_digest(key or "unnamed", name, MAX_KEY_CHARS)


@lru_cache(maxsize=64)
def clean_model_name(name: str) -> str:
    """The name of a registered model with what MLflow refuses replaced; it has a digest only if it is too long.

    A run has one such name, so it stays apart from the others.
    """
    cleaned = searchable(_NOT_IN_MODEL_NAME.sub("_", name))
    cleaned = _clean_part(cleaned) if cleaned.strip() else "unnamed"
    return cleaned if len(cleaned) <= MAX_MODEL_NAME_CHARS else _with_digest(cleaned, name, MAX_MODEL_NAME_CHARS)


def searchable(text: str) -> str:
    """A text that `in_quotes` can quote: without double quotes where it has single ones too."""
    return text.replace('"', "_") if "'" in text else text


def in_quotes(text: str) -> str:
    """A value in a filter of MLflow's search, which has no way to escape a quote."""
    return f'"{text}"' if "'" in text else f"'{text}'"


def clean_path(path: str) -> str:
    """The path of an artifact, relative to the artifact directory, with what would leave that directory replaced.

    If something is, the file's name has a digest of the given path before its suffix.
    """
    parts = [_cut_bytes(_clean_part(part)) for part in _NOT_IN_PATH.sub("_", path).split("/") if part] or ["unnamed"]
    if (cleaned := "/".join(parts)) == path:
        return path
    suffix = PurePosixPath(cleaned).suffix
    stem = parts[-1].removesuffix(suffix)
    return "/".join([*parts[:-1], _cut_bytes(f"{stem}-{_digest(path)}{suffix}")])


class Names:
    """The names that one run uses in MLflow, with a line for each that is not the name that was given.

    Effects: not collective; one thread at a time; nothing on disk.

    Args:
        say: takes a line for the user, once for each name that is not used as it was given.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._used: dict[tuple[Kind, str], str] = {}

    def of(self, kind: Kind, given: str) -> str:
        """The name in MLflow."""
        used = self._used.get((kind, given))
        return self._add(kind, given) if used is None else used

    def of_all(self, kind: Kind, values: Mapping[str, Value]) -> dict[str, Value]:
        """The values by their names in MLflow."""
        return {self.of(kind, str(name)): value for name, value in values.items()}

    def _add(self, kind: Kind, given: str) -> str:
        self._used[kind, given] = used = _CLEANERS[kind](given)
        if used != given:
            self._say(f"{kind} {_shown(given)} is named {_shown(used)} in MLflow: {_RULES[kind]}")
        return used


_CLEANERS: Final[Mapping[Kind, Callable[[str], str]]] = {
    "metric": clean_key,
    "parameter": clean_key,
    "tag": clean_key,
    "registered model": clean_model_name,
    "text": clean_path,
}
_KEY_RULE = "names hold at most 250 letters, digits and characters of '_-. :/', as a path without '..', each once"
_RULES: Final[Mapping[Kind, str]] = {
    "metric": _KEY_RULE,
    "parameter": _KEY_RULE,
    "tag": _KEY_RULE,
    "registered model": "names hold no '/' and ':', and at most 256 characters",
    "text": "paths stay within the run's artifacts, and hold no '%', '#', '?', ':' and '\\'",
}


def _leaves_or_is_not_normal(name: str) -> bool:
    # MLflow refuses every name that begins with two dots, "..a" too.
    return name.startswith("..") or any(part in ("", ".", "..") for part in name.split("/"))


def _clean_part(part: str) -> str:
    """One part of a path, which is then neither a directory's own name nor its parent's."""
    if part == ".":
        return "_"
    return f"__{part[2:]}" if part.startswith("..") else part


def _cut_bytes(part: str) -> str:
    data = part.encode()
    if len(data) <= _MAX_FILE_NAME_BYTES:
        return part
    # The end stays, which tells what is in the file.
    begin, end = data[: _MAX_FILE_NAME_BYTES - 32].decode(errors="ignore"), data[-16:].decode(errors="ignore")
    return f"{begin}-{_digest(part)}{end}"


def _with_digest(text: str, given: str, max_chars: int) -> str:
    digest = _digest(given)
    return f"{text[: max_chars - len(digest) - 1]}-{digest}"


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode(errors="surrogatepass"))[:8]


def _shown(text: str, max_chars: int = 100) -> str:
    shown = repr(text)
    return shown if len(shown) <= max_chars else f"{shown[:max_chars]}...'"
